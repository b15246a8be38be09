"""The OpenAI Videos API (/v1/videos) in front of stepvideo-serve servers: jobs in a database, videos in a folder.

config       gateway.toml
errors       what a caller is told: {"error": {message, type, param, code}}
fields       a request of the API -> the options of a generation, and back
database     tables, sessions, migrations
jobs         jobs in the database: created, claimed for a server, ended, removed
store        pictures and videos in a folder
media        a video's thumbnail, spritesheet and last frame
dispatch     one worker per server: it claims jobs, runs them, and joins those again that another process began
traces       the trace that a job belongs to
video_object what the API shows of a job
progress     a job's events
api          the HTTP application, openapi its document
pages        the web page at /, whose files are in web/
__main__     python -m stepvideo_gateway --config gateway.toml

A job is one request for a video. Its id is the REQUEST_ID of its run on a server, so that the run is found again by any
gateway. A lease says which gateway looks after a job, and until when.
"""

__version__ = "0.1.0"

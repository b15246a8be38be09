"""What the command line ends with."""

from stepvideo_client.errors import ClientError, ConnectionFailed, InvalidInput, InvalidRequest, StreamStalled

EXIT_OK = 0
EXIT_SERVER_ERROR = 1
EXIT_BAD_INPUT = 2
EXIT_UNREACHABLE = 3
EXIT_STALLED = 4
EXIT_THRESHOLD = 5
EXIT_CANCELLED = 130

EXIT_CODES = """exit codes:
  0    done
  1    the server failed the request (or the output could not be written)
  2    usage or bad input, found here or by the server (INVALID_ARGUMENT)
  3    the server cannot be reached, or is not ready
  4    the server fell silent in the middle of the generation: not a slow step, but a dead process or connection
  5    compare: a figure misses its threshold
  130  cancelled with Ctrl-C; the server is told"""


def exit_code(error: ClientError) -> int:
    """The exit code that an error which ended a command stands for."""
    if isinstance(error, InvalidInput | InvalidRequest):
        return EXIT_BAD_INPUT
    if isinstance(error, StreamStalled):
        return EXIT_STALLED
    return EXIT_UNREACHABLE if isinstance(error, ConnectionFailed) else EXIT_SERVER_ERROR

"""The log, on standard error: lines of text, or one JSON object a line."""

import json
import logging
import re
import sys
import time
from typing import Final

from stepvideo_gateway.database import Job
from stepvideo_gateway.traces import trace_id_of

JOB: Final = re.compile(r"video_[0-9a-f]{32}")
TRACE: Final = re.compile(r"\btrace=([0-9a-f]{32})\b")


def told(job: Job) -> str:
    """A job in a line of the log: its id, and that of its trace."""
    trace_id = trace_id_of(job.traceparent)
    return f"{job.id} trace={trace_id}" if trace_id else job.id


class JsonLines(logging.Formatter):
    """time (UTC), level, logger, message, and the ids of the job and the trace that the message is about."""

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        job, trace = JOB.search(message), TRACE.search(message)
        fields = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": message,
            **({"job": job.group()} if job is not None else {}),
            **({"trace_id": trace[1]} if trace is not None else {}),
            **({"exception": self.formatException(record.exc_info)} if record.exc_info else {}),
        }
        return json.dumps(fields, ensure_ascii=True)  # control characters that a caller sent stay escaped


class TextLines(logging.Formatter):
    """Lines for people, with the same contents; text of a caller cannot begin a line of its own."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's name
        record.message = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in record.message)
        return super().formatMessage(record)


def configure(form: str) -> None:
    """Sets the log of the whole process up. `form`: text or json."""
    handler = logging.StreamHandler(sys.stderr)
    text = TextLines("%(asctime)s %(levelname)s %(name)s %(message)s")
    handler.setFormatter(JsonLines() if form == "json" else text)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)  # the client's warning about calls in clear text
    for noisy in ("alembic", "httpx2", "httpcore2"):
        logging.getLogger(noisy).setLevel(logging.WARNING)

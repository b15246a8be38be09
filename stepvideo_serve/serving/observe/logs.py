"""Where the log records of the models and of their ranks go: to the server's log, as text or as a line of JSON each.

An event is `log_event(logger, "request_ended", request_id=..., seconds=...)`.
"""

import json
import logging
import os
import re
import sys
from datetime import UTC, datetime
from typing import Any

from stepvideo_serve.config import LoggingConfig
from stepvideo_serve.errors import ConfigError
from stepvideo_serve.launch.options import LOG_LEVEL_VARIABLE, LOG_LEVELS

# What steers a terminal or turns the direction of a line around: C0 but tab and newline, DEL, C1, line separators, and
# the marks of bidirectional text.
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")
MAX_TEXT = 400  # characters of a field that may come from a caller


def log_event(logger: logging.Logger, event: str, level: int = logging.INFO, **fields: object) -> None:
    """Logs an event with its fields; those that are None or "" are left out."""
    kept = {name: _short(value) for name, value in fields.items() if value not in (None, "")}
    logger.log(level, event, extra={"fields": kept})


def configure_logging(config: LoggingConfig, model: str, in_stub: bool) -> None:
    """Sends the log records of this process to the server's log, once, from the configured level on, or from that which
    the start was given.

    model    its name, for a rank "dit_denoiser rank 0" and so on
    in_stub  whether this is a stub of Triton, whose logger then prints the text; ranks write to the standard error
             that they share with the server, and so does every line of JSON, because Triton would quote it
    Raises ConfigError for another level than there are.
    """
    handler: logging.Handler
    if config.format == "json":
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(JsonFormatter(model))
    else:
        handler = TritonHandler() if in_stub else logging.StreamHandler(sys.stderr)
        handler.setFormatter(TextFormatter(model))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(_level(config).upper())


def _level(config: LoggingConfig) -> str:
    level = os.environ.get(LOG_LEVEL_VARIABLE) or config.level
    if level not in LOG_LEVELS:
        raise ConfigError(f"{LOG_LEVEL_VARIABLE} must be one of {', '.join(LOG_LEVELS)}, got {level!r}: correct it.")
    return level


class JsonFormatter(logging.Formatter):
    """{"time": ISO 8601 in UTC, "level", "model", "logger", "event", fields of the event ..., "traceback"}."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self._model = model

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "model": self._model,
            "logger": record.name,
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return visible(json.dumps(line, ensure_ascii=False, default=str))


class TextFormatter(logging.Formatter):
    """`model: event name=value ...`, values as in JSON."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self._model = model

    def format(self, record: logging.LogRecord) -> str:
        fields = [f"{name}={_plain(value)}" for name, value in getattr(record, "fields", {}).items()]
        text = " ".join([f"{self._model}:", record.getMessage(), *fields])
        return visible(f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text)


class TritonHandler(logging.Handler):
    """Hands the text to Triton's logger."""

    def __init__(self) -> None:
        super().__init__()
        import triton_python_backend_utils as pb_utils  # exists in the stubs only

        self._triton = pb_utils.Logger

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
            if record.levelno >= logging.ERROR:
                self._triton.log_error(text)
            elif record.levelno >= logging.WARNING:
                self._triton.log_warn(text)
            else:
                self._triton.log_info(text)
        except Exception:  # as every Handler of the standard library: told on standard error, never to who logs
            self.handleError(record)


def visible(text: str) -> str:
    """With UNSEEN characters as \\uXXXX, which JSON reads as what they were."""
    return UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _short(value: object) -> object:
    if isinstance(value, float):
        return round(value, 6)
    return value[:MAX_TEXT] if isinstance(value, str) else value


def _plain(value: object) -> str:
    """A text without blanks as it is, else as JSON."""
    if isinstance(value, str) and value.isprintable() and not set(value) & set(' "='):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)

"""What Polygraphy and TensorRT say during a build: in a file, and the errors at hand.

Polygraphy has one logger of its own, which TensorRT's messages go through as well. It prints to standard output, where
the child tells its progress, so it is led to Python's logging.
"""

import logging
from pathlib import Path

VERBOSE = 6  # as which Polygraphy hands on what TensorRT calls verbose


class Messages(logging.FileHandler):
    """Every message in a file that is flushed after each, so that a crash keeps them. reasons: the texts of errors."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, mode="a", encoding="utf-8")
        self.setFormatter(logging.Formatter("[%(levelname)s] %(message)s"))
        self.reasons: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        super().emit(record)
        if record.levelno == logging.ERROR:
            self.reasons.append(record.getMessage())


def listen(path: Path) -> Messages:
    """Leads all that is said in this process from now on to the file."""
    from polygraphy.logger import G_LOGGER

    messages, python = Messages(path), logging.getLogger("Polygraphy")
    logging.addLevelName(VERBOSE, "VERBOSE")
    python.setLevel(logging.NOTSET + 1)
    python.propagate = False
    python.addHandler(messages)
    G_LOGGER.colors = G_LOGGER.letter = False  # the lines of a plan begin where they begin
    G_LOGGER.use_python_logging_system = True
    G_LOGGER.module_severity = G_LOGGER.EXTRA_VERBOSE
    return messages

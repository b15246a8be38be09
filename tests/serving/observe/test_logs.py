"""How log records look, whatever is in them."""

import json
import logging
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from stepvideo_serve.config import LoggingConfig
from stepvideo_serve.serving.observe.logs import MAX_TEXT, configure_logging, log_event

LOGGER = logging.getLogger("stepvideo_serve.tests")
HOSTILE = 'x" y=z\n{"event": "forged"}\x1b[2J 一'


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield root
    root.handlers, root.level = handlers, level


@pytest.mark.usefixtures("root_logger")
def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(LoggingConfig("json"), "ti2v", in_stub=False)
    log_event(LOGGER, "request_ended", request_id=HOSTILE, seconds=1.23456789, code="OK", error=None, trace_id="")
    LOGGER.warning("plain %d", 3)
    LOGGER.debug("not logged")
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    at = datetime.fromisoformat(first.pop("time"))
    assert timedelta(0) <= datetime.now(UTC) - at < timedelta(minutes=5)
    assert first == {
        "level": "INFO",
        "model": "ti2v",
        "logger": LOGGER.name,
        "event": "request_ended",
        "request_id": HOSTILE,
        "seconds": 1.234568,
        "code": "OK",
    }
    assert (second["level"], second["event"]) == ("WARNING", "plain 3")


@pytest.mark.usefixtures("root_logger")
def test_a_traceback_stays_in_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(LoggingConfig("json"), "ti2v", in_stub=False)
    try:
        raise ValueError("inside")
    except ValueError:
        LOGGER.error("failed", exc_info=sys.exc_info())
    [line] = capsys.readouterr().err.splitlines()
    assert "ValueError: inside" in json.loads(line)["traceback"]


@pytest.mark.usefixtures("root_logger")
def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(LoggingConfig("text"), "dit_denoiser rank 1", in_stub=False)
    log_event(LOGGER, "turn_ended", request_id="plain-1", seconds=0.5, error=HOSTILE)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("dit_denoiser rank 1: turn_ended request_id=plain-1 seconds=0.5 error=")
    assert json.loads(line.partition("error=")[2]) == HOSTILE


@pytest.mark.usefixtures("root_logger")
def test_a_text_of_a_caller_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(LoggingConfig("json"), "ti2v", in_stub=False)
    log_event(LOGGER, "request_ended", error="x" * 10 * MAX_TEXT)
    assert len(json.loads(capsys.readouterr().err)["error"]) == MAX_TEXT

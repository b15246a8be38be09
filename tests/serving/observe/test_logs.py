"""How log records look, whatever is in them."""

import json
import logging
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import pytest

from stepvideo_serve.config import LoggingConfig
from stepvideo_serve.errors import ConfigError
from stepvideo_serve.launch.options import LOG_LEVEL_VARIABLE, LOG_LEVELS
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
@pytest.mark.parametrize(
    ("configured", "given", "first"), [("debug", None, 0), ("error", None, 3), ("error", "info", 1)]
)
def test_the_level_is_that_of_the_start_or_of_the_configuration(
    configured: Any, given: str | None, first: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if given is not None:
        monkeypatch.setenv(LOG_LEVEL_VARIABLE, given)
    configure_logging(LoggingConfig("json", configured), "ti2v", in_stub=False)
    for level in LOG_LEVELS:
        LOGGER.log(logging.getLevelNamesMapping()[level.upper()], level)
    assert [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()] == list(LOG_LEVELS[first:])


@pytest.mark.usefixtures("root_logger")
def test_another_level_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LOG_LEVEL_VARIABLE, "loud")
    with pytest.raises(ConfigError, match="STEPVIDEO_LOG_LEVEL must be one of debug, info, warning, error, got 'loud'"):
        configure_logging(LoggingConfig(), "ti2v", in_stub=False)


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


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize(
    "mark", ["\x1b", "\r", "\x7f", "\x85", "\x9b", "\u2028", "\u202e", "\u2066", "\u200f", "\u061c"]
)
@pytest.mark.usefixtures("root_logger")
def test_what_steers_a_terminal_or_turns_a_line_is_escaped(
    capsys: pytest.CaptureFixture[str], form: Literal["text", "json"], mark: str
) -> None:
    configure_logging(LoggingConfig(form), "ti2v", in_stub=False)
    log_event(LOGGER, "request_ended", request_id=f"一{mark}2J", error=f"INVALID_ARGUMENT: got {mark}.")
    LOGGER.error("a message with %s", mark)
    lines = capsys.readouterr().err
    assert mark not in lines
    assert lines.count(f"\\u{ord(mark):04x}") == 3 or mark == "\r"
    assert lines.count("\n") == 2
    assert "一" in lines
    if form == "json":
        assert json.loads(lines.splitlines()[0])["request_id"] == f"一{mark}2J"

"""perf.analyzer notices that perf_analyzer waits for nothing, by a server that has nothing to do."""

from pathlib import Path

import pytest

from perf.analyzer.__main__ import Analyzer, Load
from perf.analyzer.idle import IdleClock
from tests.serving.calls import Server, Values

STALLED_S = 0.5


@pytest.fixture
def stalls_once(tmp_path: Path) -> Analyzer:
    """A stand-in for the program, which stalls one time in some hundred: the first time, here."""
    program, whole = tmp_path / "program", Path(__file__).parents[1] / "perf" / "stream.export"
    program.write_text(
        '#!/bin/sh\nfor one; do case "$one" in --profile-export-file=*) target="${one#*=}";; esac; done\n'
        f'echo >> "{tmp_path}/count"\n'
        f'if [ "$(wc -l < "{tmp_path}/count")" -gt 1 ]; then cp "{whole}" "$target"; else exec sleep 1000; fi\n'
    )
    program.chmod(0o755)
    return Analyzer(program, tmp_path)


def test_a_load_that_stalls_is_measured_again(
    server: Server,
    small: Values,
    stalls_once: Analyzer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.stream_result(small)  # a server that has measured nothing yet gives no quotes
    for name, value in (("STALLED_S", STALLED_S), ("PAUSES", 0.0), ("LOOK_S", 0.1)):
        monkeypatch.setattr(f"perf.analyzer.__main__.{name}", value)
    load = Load("ti2v_unary", "rate", 0.5)
    assert stalls_once.run(load, server.grpc_url, tmp_path / "data", 1, tmp_path, []) is None
    assert "attempt 1 of 3: perf_analyzer has sent nothing for " in capsys.readouterr().err
    assert (tmp_path / f"{load.name}.export.json").is_file()


def test_a_server_that_computes_is_not_idle(server: Server, small: Values, long: Values) -> None:
    server.stream_result(small)
    clock = IdleClock(server.grpc_url)
    with server.open(long) as call:
        call.next()
        assert clock.idle_s() < STALLED_S
        busy = IdleClock(server.grpc_url)
        busy.idle_s()
        assert busy.idle_s() < STALLED_S

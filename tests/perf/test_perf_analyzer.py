"""perf_analyzer: what it is given, and (slow) one run of the real one against the real server."""

import base64
import json
import shutil
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from perf.analyzer.__main__ import ATTEMPTS, WHEEL, Analyzer, Load, expand, loads, main
from perf.analyzer.report import NAME, read_folder
from perf.analyzer.wheel import Wheel
from stepvideo_serve.errors import SetupError
from stepvideo_serve.launch.options import ServerOptions
from stepvideo_serve.launch.server import TritonServer
from tests.serving.conftest import config_text, engines
from tests.serving.launch import Engines

__all__ = ["Engines", "config_text", "engines"]


def described(folder: Path, text: str) -> Path:
    path = folder / "inputs.json"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["small", "official"])
def test_committed_inputs(root: Path, name: str) -> None:
    path = root / "perf" / "inputs" / f"{name}.json"
    requests = json.loads(path.read_text(encoding="utf-8"))["requests"]
    data = expand(path)["data"]
    picture = (root / "client" / "examples" / "first_frame.png").read_bytes()
    assert len(data) == len(requests) >= 3
    assert len({(r["NUM_FRAMES"], r["HEIGHT"], r["WIDTH"]) for r in requests}) == len(requests), "several shapes"
    for given, request in zip(data, requests, strict=True):
        assert not request["PROMPT"].isascii()
        assert given["PROMPT"] == {"content": [request["PROMPT"]], "shape": [1]}
        assert given["STEPS"] == {"content": [request["STEPS"]], "shape": [1]}
        wire = base64.b64decode(given["IMAGE"]["content"]["b64"])
        assert wire == struct.pack("<I", len(picture)) + picture


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"image": "none.png", "requests": [{}]}', '{"image": "inputs.json", "requests": [3]}'],
)
def test_inputs_that_are_wrong(tmp_path: Path, text: str) -> None:
    with pytest.raises(SetupError, match=r"inputs\.json must be JSON as"):
        expand(described(tmp_path, text))


def test_inputs_without_requests(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="at least one request"):
        expand(described(tmp_path, '{"image": "inputs.json", "requests": []}'))


def test_loads_and_their_files() -> None:
    planned = loads(["ti2v", "ti2v_unary"], [2.0, 1.0], [0.25])
    assert planned[:3] == [
        Load("ti2v", "concurrency", 1.0),
        Load("ti2v", "concurrency", 2.0),
        Load("ti2v", "rate", 0.25),
    ]
    assert len(planned) == 6
    for load in planned:
        found = NAME.fullmatch(f"{load.name}.export.json")
        assert found is not None
        assert (found["model"], found["load"], float(found["value"])) == (load.model, load.kind, load.value)
        assert ("--streaming" in load.arguments()) is (load.model == "ti2v")
    assert "--request-rate-range=0.25:0.25" in planned[2].arguments()


def test_a_program_that_fails_says_why(tmp_path: Path) -> None:
    """A stand-in for the program, which cannot be made to fail this way on demand."""
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\necho 'Error: no such model'\necho usage\nexit 99\n")
    program.chmod(0o755)
    (tmp_path / "ti2v.rate.1.export.json").write_text("of an earlier run")
    analyzer = Analyzer(program, tmp_path)
    reason = analyzer.run(Load("ti2v", "rate", 1.0), "127.0.0.1:9", tmp_path / "data", 1, tmp_path, [])
    assert reason is not None
    assert reason.startswith("Error: no such model (exit code 99, log ")
    assert not list(tmp_path.glob("*.export.json")), "a row of an earlier run would pass for this one's"


def breaks_off(folder: Path, times: int) -> Analyzer:
    """A stand-in for the program that ends with exit code 0 and writes whole pages only, as the real one does when a
    number is a NaN; after so many `times` it writes all."""
    program = folder / "program"
    whole = Path(__file__).with_name("stream.export")
    program.write_text(
        '#!/bin/sh\nfor one; do case "$one" in --profile-export-file=*) target="${one#*=}";; esac; done\n'
        f'echo >> "{folder}/count"\n'
        f'if [ "$(wc -l < "{folder}/count")" -gt {times} ]; then cp "{whole}" "$target"\n'
        'else printf \'{"experiments":[{"requests":[{"a\' > "$target"; fi\n'
    )
    program.chmod(0o755)
    return Analyzer(program, folder)


def test_an_export_that_breaks_off_is_measured_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load = Load("ti2v", "rate", 1.0)
    analyzer = breaks_off(tmp_path, ATTEMPTS - 1)
    assert analyzer.run(load, "127.0.0.1:9", tmp_path / "data", 1, tmp_path, []) is None
    assert len((tmp_path / "count").read_text()) == ATTEMPTS
    assert capsys.readouterr().err.count("cannot be read as one: Unterminated string") == ATTEMPTS - 1
    assert [row.requests for row in read_folder(tmp_path)] == [3]


def test_an_export_that_always_breaks_off_is_no_result(tmp_path: Path) -> None:
    analyzer = breaks_off(tmp_path, 1000)
    reason = analyzer.run(Load("ti2v", "rate", 1.0), "127.0.0.1:9", tmp_path / "data", 1, tmp_path, [])
    assert reason is not None
    assert "must be an export of perf_analyzer, but cannot be read as one: Unterminated string" in reason
    assert len((tmp_path / "count").read_text()) == ATTEMPTS
    assert not list(tmp_path.glob("*.export*"))


@pytest.mark.slow
def test_no_address_breaks_an_export_off(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real program, at the addresses that it has without randomisation: there most exports broke off. The server
    is the real one, with a model of ti2v's signature that answers at once."""
    for model in ("ti2v", "ti2v_unary"):
        (tmp_path / "models" / model / "1").mkdir(parents=True)
        shutil.copy(root / "model_repository" / model / "config.pbtxt", tmp_path / "models" / model)
        shutil.copy(Path(__file__).with_name("answers_at_once.py"), tmp_path / "models" / model / "1" / "model.py")
    program = tmp_path / "program"
    analyzer = Analyzer.install(root / "build/perf_analyzer")
    program.write_text(f'#!/bin/sh\nexec setarch -R "{analyzer.program}" "$@"\n')
    program.chmod(0o755)
    if subprocess.run(["setarch", "-R", "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("needs permission to switch off the randomisation of addresses")
    data = tmp_path / "data.json"
    data.write_text(json.dumps(expand(root / "perf/inputs/small.json")))
    monkeypatch.setattr("perf.analyzer.__main__.ATTEMPTS", 1)
    with TritonServer(ServerOptions(tmp_path / "models", log=tmp_path / "server.log")) as server:
        server.wait_ready()
        for model in ("ti2v", "ti2v_unary"):
            for _ in range(10):
                load = Load(model, "concurrency", 2.0)
                one = replace(analyzer, program=program)
                assert one.run(load, server.grpc_url, data, 6, tmp_path, []) is None


def test_a_wheel_with_another_hash_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"tritonclient 2\.51\.0 .* must be downloaded with the pinned hash"):
        Wheel(WHEEL.name, WHEEL.version, "0" * 64).extract("/bin/perf_analyzer", tmp_path / "program")
    assert not (tmp_path / "program").exists()


@pytest.mark.parametrize("arguments", [["--concurrency=0"], ["--rates=-1"], ["--rates=many"]])
def test_wrong_arguments(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)


@pytest.mark.slow
def test_the_real_one_against_the_real_server(
    root: Path, tmp_path: Path, config_text: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(root)
    config = tmp_path / "serve.toml"
    config.write_text(config_text, encoding="utf-8")
    out = tmp_path / "out"
    arguments = ["--config", str(config), "--out", str(out), "--concurrency=2", "--rates=1", "--requests=3"]
    assert main(arguments) == 0, capfd.readouterr().err
    rows = read_folder(out)
    assert [(row.model, row.load, row.value, row.requests) for row in rows] == [
        ("ti2v", "concurrency", 2.0, 3),
        ("ti2v", "rate", 1.0, 3),
        ("ti2v_unary", "concurrency", 2.0, 3),
        ("ti2v_unary", "rate", 1.0, 3),
    ]
    for row in rows:
        assert 0 < row.first_p50_s <= row.p50_s <= row.p95_s <= row.p99_s
        assert 0 <= row.waiting < 1
        assert row.first_p50_s < row.p50_s or row.model == "ti2v_unary"
    assert "Inferences/Second" in (out / "ti2v.concurrency.2.csv").read_text()

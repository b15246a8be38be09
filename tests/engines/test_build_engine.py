"""Engines of a whole checkpoint: what is recorded, what is built again, and what happens when a build goes wrong."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from export.engines.child import Job
from export.engines.process import run_child
from export.engines.toolkit import child_environment
from stepvideo_serve.engine.manifest import EngineTarget, Manifest
from stepvideo_serve.engine.nvinfer import checked_file
from stepvideo_serve.engine.parity import require_parity
from stepvideo_serve.errors import EngineError, ExportError
from tests import signals
from tests.engines.conftest import build

CHEAP = ("--only", "dit_final", "dit_context", "dit_cross_00")
CHEAP_NAMES = {"dit_final", "dit_context", "dit_cross_00"}


def engine_times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.engine")}


def test_every_graph_becomes_an_engine(engines: Path, graphs: Path) -> None:
    source, built = Manifest.load(graphs), Manifest.load(engines)
    assert built.graphs.keys() == source.graphs.keys()
    built.verify(engines, hashes=True)
    require_parity(built, built.graphs)
    assert (built.checkpoint, built.precision) == (source.checkpoint, "bf16")
    assert EngineTarget.of(built, engines) == EngineTarget(
        "tensorrt_rtx", built.tools["tensorrt_rtx"], 89, "single", part=""
    )
    for name, entry in built.graphs.items():
        assert entry.extras["parity"] == source.graph(name).extras["parity"]
        assert entry.extras["plan"]["activation_bytes"] <= entry.extras["plan"]["activation_bound_bytes"]
        assert entry.extras["seconds"] > 0
        assert entry.extras["peak_bytes"] > 2**20
        plan = json.loads((engines / f"{name}.plan.json").read_text(encoding="utf-8"))
        assert {row["name"] for row in plan["bindings"]} == {t.name for t in (*entry.spec.inputs, *entry.spec.outputs)}


def test_the_plan_of_a_block(engines: Path) -> None:
    plan = Manifest.load(engines).graph("dit_block_00").extras["plan"]
    assert (plan["gemms"], plan["fp8_gemms"], plan["fused_attentions"]) == (6, 0, 2)


def test_profiles_are_those_of_the_shapes(engines: Path) -> None:
    dims = Manifest.load(engines).graph("dit_block_00").spec.dims
    assert (dims["tokens"].min, dims["tokens"].opt, dims["tokens"].max) == (32, 48, 48)
    plan = json.loads((engines / "dit_block_00.plan.json").read_text(encoding="utf-8"))
    tokens = next(row for row in plan["bindings"] if row["name"] == "tokens")
    assert [shape[1] for shape in tokens["profile"]] == [32, 48, 48]


def test_sm_120_and_one_size(graphs: Path, tmp_path: Path) -> None:
    done = build(graphs, tmp_path / "out", "--fixed", "--only", "dit_*", sm=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "dit_block, 2 of 2: all 2 take" in done.stdout
    manifest = Manifest.load(tmp_path / "out")
    assert EngineTarget.of(manifest, tmp_path).sm == 120
    assert manifest.graph("dit_block_01").spec.dims["tokens"].min == 48


def test_run_again_it_builds_only_what_is_missing_or_stale(graphs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "3 built, 0 up to date" in build(graphs, out, *CHEAP).stdout
    before = engine_times(out)
    assert "0 built, 3 up to date" in build(graphs, out, *CHEAP).stdout
    (out / "dit_final.engine").unlink()
    assert "1 built, 2 up to date" in build(graphs, out, *CHEAP).stdout
    after = engine_times(out)
    assert {name for name in after if before[name] != after[name]} == {"dit_final.engine"}
    done = build(graphs, out, *CHEAP, "--fixed")  # fixes the tokens, which only one of them has
    assert "1 built, 2 up to date" in done.stdout


def test_killed_in_mid_build_then_resumed(graphs: Path, tmp_path: Path, root: Path) -> None:
    """kill -9 leaves no process behind, nothing half-written is taken for finished, and what is finished stays."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "export.build_engine", "--onnx", str(graphs), "--out", str(out), "--quiet"]
    command += ["--backend", "tensorrt_rtx", "--sm", "89", "--shapes", "64x64x17"]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as parent:
        wait_until(lambda: len(engine_times(out)) >= 2 and bool(list(out.glob(".*.partial/job.json"))))
        child = next(iter(out.glob(".*.partial"))).name
        parent.kill()
    finished = engine_times(out)
    recorded = set(Manifest.load(out).graphs)
    assert {f"{name}.engine" for name in recorded} <= set(finished)
    wait_until(lambda: not builders(out))
    done = build(graphs, out)
    assert done.returncode == 0, done.stdout + done.stderr
    total = len(Manifest.load(graphs).graphs)
    assert f"{total - len(recorded)} built, {len(recorded)} up to date" in done.stdout
    after = engine_times(out)
    assert all(after[f"{name}.engine"] == finished[f"{name}.engine"] for name in recorded)
    assert not (out / child).exists()


def wait_until(done: object, timeout_s: float = 120.0) -> None:
    assert callable(done)
    limit = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < limit, "it took too long"
        time.sleep(0.02)


def builders(out: Path) -> list[int]:
    """Processes that build into `out`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if "export.engines.child" in line and str(out) in line:
            found.append(int(path.parent.name))
    return found


def test_a_crash_names_its_signal_and_the_log(graphs: Path, tmp_path: Path) -> None:
    """SIGFPE, with which the builder has been seen to die, at the first step of a build."""
    name = "dit_final"
    engine, log, result = (str(tmp_path / kind) for kind in ("engine", "log", "result"))
    profile = Manifest.load(graphs).graph(name).spec.profile()
    job = Job("tensorrt_rtx", 89, str(graphs / f"{name}.onnx"), engine, log, result, {"tokens": profile["tokens"]})

    def crash(_: str) -> None:
        for pid in builders(tmp_path):
            os.kill(pid, signal.SIGFPE)

    with pytest.raises(ExportError, match=r"the builder crashed with SIGFPE; see .*/log"):
        run_child(job, tmp_path, child_environment("tensorrt_rtx", tmp_path / "lib"), crash)
    assert Path(log).stat().st_size > 0
    assert not Path(engine).exists()


def test_a_graph_that_cannot_be_built_does_not_keep_the_others_from_it(graphs: Path, tmp_path: Path) -> None:
    broken = tmp_path / "graphs"
    shutil.copytree(graphs, broken)
    (broken / "dit_context.onnx.data").write_bytes(b"")
    done = build(broken, tmp_path / "out", *CHEAP)
    assert done.returncode == 1
    assert "dit_context: Graph dit_context: " in done.stdout
    assert "2 built, 0 up to date, 1 failed" in done.stdout
    assert set(Manifest.load(tmp_path / "out").graphs) == CHEAP_NAMES - {"dit_context"}


def test_no_room_for_an_engine(graphs: Path, tmp_path: Path, root: Path) -> None:
    """A limit on the size of files stands for a full disk: the write fails after some bytes."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "export.build_engine", "--onnx", str(graphs), "--out", str(out), "--quiet"]
    command += ["--backend", "tensorrt_rtx", "--sm", "89", "--shapes", "64x64x17", "--only", "dit_cross_00"]
    limit = 300 * 1024
    done = subprocess.run(
        command,
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "dit_cross_00: [Errno 27] File too large" in done.stdout
    assert not list(out.glob("*.engine"))
    assert not Manifest.load(out).graphs


def test_a_flipped_byte_is_refused_by_name(engines: Path, tmp_path: Path) -> None:
    entry = Manifest.load(engines).graph("dit_final")
    content = bytearray((engines / entry.file).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / entry.file).write_bytes(content)
    with checked_file("dit_final", engines, entry.files[0]) as mapped:
        assert len(mapped) == len(content)
    refused = pytest.raises(EngineError, match=r"Engine dit_final: .*dit_final\.engine must have SHA-256")
    with refused, checked_file("dit_final", tmp_path, entry.files[0]):
        pytest.fail("it was opened")


def test_interrupted(graphs: Path, tmp_path: Path, root: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "export.build_engine", "--onnx", str(graphs), "--out", str(out), "--quiet"]
    command += ["--backend", "tensorrt_rtx", "--sm", "89", "--shapes", "64x64x17"]
    with signals.start(command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as parent:
        wait_until(lambda: bool(list(out.glob(".*.partial/job.json"))))
        signals.interrupt(parent)
        _, message = parent.communicate(timeout=60)
    assert parent.returncode == 130
    assert message.splitlines()[-1].startswith("build_engine: interrupted")
    assert not list(out.glob(".*.partial"))
    assert not builders(out)

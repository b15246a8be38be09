"""What engines give beside what they should: `make verify GPU=1`, with torch in the place of the driver."""

import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from export import verify
from export.compare.engines import Open, compare_engines
from export.compare.engines import report as engine_report
from export.graphs.placement import export_plan
from export.graphs.recipe import Recipe
from export.quantize.calibration import Calibration
from export.quantize.fp8 import Fp8
from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.engine.manifest import LOOP, EngineTarget, Manifest
from stepvideo_serve.engine.parity import require_parity
from stepvideo_serve.engine.runner import EagerRunner, EngineRunner
from stepvideo_serve.errors import EngineError, ExportError
from stepvideo_serve.parallel.layout import Layout
from tests.engines.conftest import Run, build, export

CHEAP = ("dit_final", "dit_context", "dit_block_00")
Change = Callable[[Tensor], Tensor]


class ChangedRunner(EngineRunner):
    """Another runner whose outputs are changed: an engine that computes something else."""

    def __init__(self, inner: EngineRunner, change: Change) -> None:
        super().__init__(inner.spec, inner.device, "changed")
        self._inner, self._change = inner, change

    def _run(self, inputs: dict[str, Tensor], dims: dict[str, int]) -> dict[str, Tensor]:
        del dims
        return {name: self._change(output) for name, output in self._inner(**inputs).items()}

    def _release(self) -> None:
        self._inner.close()


def torch_opener(model: Path, change: Change | None = None, recipe: Recipe | None = None) -> Callable[..., Open]:
    """Opens, in the place of an engine, its module in torch in bf16."""

    def opener(folder: Path, manifest: Manifest) -> Open:
        target = EngineTarget.of(manifest, folder)
        root = folder.parent if target.part else folder
        table = export_plan(Checkpoint(model), root, "bf16", Layout.parse(target.layout), split_llm=False)[folder]

        def open_engine(name: str) -> EngineRunner:
            load = table[name].load if recipe is None else recipe.same_precision(table[name])
            runner = EagerRunner(manifest.graph(name).spec, load())
            return runner if change is None else ChangedRunner(runner, change)

        return open_engine

    return opener


@pytest.fixture
def some(engines: Path, tmp_path: Path) -> Path:
    """A copy of the manifest with a few of its engines; nothing here opens their files."""
    manifest = Manifest.load(engines)
    replace(manifest, graphs={name: manifest.graph(name) for name in CHEAP}).save(tmp_path)
    return tmp_path


def test_rows_of_the_engines_join_the_table(
    some: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twice, since the second run replaces the rows of the first."""
    monkeypatch.setattr(verify, "gpu_opener", torch_opener(checkpoint))
    arguments = ["--engines", str(some), "--gpu", "--model-dir", str(checkpoint)]
    assert verify.main(arguments) == 0
    assert verify.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines if line.startswith("dit_final")] == ["onnxruntime", "engine"] * 2
    manifest = Manifest.load(some)
    require_parity(manifest, CHEAP)
    for name in CHEAP:
        entry = manifest.graph(name)
        rows = [row for row in entry.extras["parity"] if row["backend"] == "engine"]
        outputs = [tensor.name for tensor in entry.spec.outputs]
        assert sorted(row["output"] for row in rows) == sorted(2 * outputs)
        for row in rows:
            assert all(
                entry.spec.dims[dim].min <= size <= entry.spec.dims[dim].max for dim, size in row["sizes"].items()
            )
            assert 1e-3 < row["allowed"] == 2 * row["error"]  # of torch in bf16, which it is
            assert 0 < row["rms"] < row["error"]
            assert 0.999 < row["cosine"] <= 1


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda x: x * 1.1, id="scale"),
        pytest.param(lambda x: x.roll(1, -1), id="places"),
        pytest.param(lambda x: torch.cat([x[..., :5], 0 * x[..., 5:6], x[..., 6:]], -1), id="a column"),
        pytest.param(lambda x: x * float("nan"), id="nan"),
    ],
)
def test_a_wrong_engine_fails_and_is_not_served(
    some: Path, checkpoint: Path, change: Change, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its graph's own report passes."""
    manifest = Manifest.load(some)
    replace(manifest, graphs={"dit_context": manifest.graph("dit_context")}).save(some)
    monkeypatch.setattr(verify, "gpu_opener", torch_opener(checkpoint, change))
    arguments = ["--engines", str(some), "--gpu", "--model-dir", str(checkpoint)]
    assert verify.main(arguments) == 1
    assert "dit_context is off by more than its report allows (engine" in capsys.readouterr().out
    assert verify.main(["--engines", str(some)]) == 1  # it is on record
    with pytest.raises(EngineError, match=r"Engine dit_context must be within .* of the reference"):
        require_parity(Manifest.load(some), ["dit_context"])


def test_without_a_gpu(some: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    assert verify.main(["--engines", str(some), "--gpu", "--model-dir", str(checkpoint)]) == 2
    message = capsys.readouterr().err
    assert message == (
        f"verify: --gpu runs the engines in {some} on an NVIDIA GPU with its driver, found none: leave it out, or "
        "verify on the machine that serves.\n"
    )


def test_without_gpu_the_stored_reports_are_printed(
    some: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "compare_engines", lambda *_: pytest.fail("nothing was to run"))
    assert verify.main(["--engines", str(some)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{some}: bf16, EngineTarget(backend='tensorrt_rtx'")
    assert {line.split()[0] for line in lines if line.startswith("dit_")} == set(CHEAP)


def test_the_loop_of_the_graphs_counts_for_their_engines(some: Path, graphs: Path) -> None:
    keys = {name: entry.key for name, entry in Manifest.load(graphs).graphs.items()}
    loop = {"graphs": keys, "steps": [], "value": 1.5, "allowed": 2.0, "passed": True, "rule": "rms error"}
    manifest = Manifest.load(some)
    for changes, sentence in (
        ({}, None),
        ({"passed": False, "value": 6.8}, "The loop must have a rms error of at most 2, has 6.8."),
        ({"graphs": {**keys, "dit_final": "other"}}, "The loop was compared with other graphs"),
    ):
        replace(manifest, extra={**manifest.extra, LOOP: {**loop, **changes}}).save(some)
        lines, passed = engine_report(some)
        assert passed == (sentence is None)
        assert any(line.startswith("rms error: ") for line in lines)
        if sentence is not None:
            assert lines[-1].startswith(sentence)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpu",), "--gpu compares engines with their checkpoint, got no --model-dir: add it."),
        (("--goldens", "."), "--engines and --goldens are two verifications, got both"),
        (("--gpu", "--model-dir", "OTHER"), "which is another or changed since"),
    ],
)
def test_wrong_arguments(
    some: Path,
    mini_checkpoint: Path,
    arguments: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [str(mini_checkpoint) if argument == "OTHER" else argument for argument in arguments]
    assert verify.main(["--engines", str(some), *given]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_graphs_are_no_engines_and_nothing_is_nothing(graphs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main(["--engines", str(graphs)]) == 2
    assert "must hold TensorRT engines" in capsys.readouterr().err
    assert verify.main([]) == 2
    assert "got neither --goldens nor --engines" in capsys.readouterr().err


def test_fp8_engines_need_the_calibration_they_were_made_with(
    fp8_graphs: Path, checkpoint: Path, calibration: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert build(fp8_graphs, out, "--only", "dit_block_00").returncode == 0
    recipe = Recipe("fp8", Fp8(Calibration.load(calibration)))
    with pytest.raises(ExportError, match="Engines in fp8 need the calibration that they were made with, got none"):
        compare_engines(out, checkpoint, None, torch_opener(checkpoint))
    found = Calibration.load(calibration)
    replace(found, settings={"steps": 3}).save(tmp_path / "other.json")
    with pytest.raises(ExportError, match=r"made with a calibration of \{\}, .*other\.json is one of \{'steps': 3\}"):
        compare_engines(out, checkpoint, tmp_path / "other.json", torch_opener(checkpoint))
    compare_engines(out, checkpoint, calibration, torch_opener(checkpoint, recipe=recipe))
    rows = [row for row in Manifest.load(out).graph("dit_block_00").extras["parity"] if row["backend"] == "engine"]
    assert all(0.01 < row["allowed"] == 2 * row["error"] for row in rows), "the measure is quantised, too"


def test_engines_of_every_rank(checkpoint: Path, tool: Run, tmp_path: Path) -> None:
    onnx, out = tmp_path / "onnx", tmp_path / "out"
    export(tool, checkpoint, onnx, "dit_final", "dit_ff_00", "--layout", "tp2", "--no-compare")
    assert build(onnx, out, "--layout", "tp2").returncode == 0
    assert not engine_report(out)[1], "nothing was compared yet"
    compare_engines(out, checkpoint, None, torch_opener(checkpoint))
    lines, passed = engine_report(out)
    assert passed
    assert [line.split()[0] for line in lines if line.startswith("dit_")] == ["dit_final", *2 * ["dit_ff_00"] * 2]
    swapped = Manifest.load(out / "tp0of2")
    assert swapped.graph("dit_ff_00").key != Manifest.load(out / "tp1of2").graph("dit_ff_00").key


def test_make(root: Path, tmp_path: Path) -> None:
    """What `make verify` runs, by its variables."""

    def commands(*given: str) -> str:
        # A make that runs the tests hands its own variables down, OUT among them.
        environment = {name: value for name, value in os.environ.items() if name in ("HOME", "PATH")}
        command = ["make", "-n", "verify", *given]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
        return " ".join(done.stdout.replace("\\\n", "").split())

    run = "PYTHONPATH=kernels:. .venv/bin/python -m export.verify --engines"
    assert f"{run} '{tmp_path}'" in commands(f"OUT={tmp_path}")
    with_gpu = commands(f"OUT={tmp_path}", "GPU=1", "MODEL_DIR=model", "CALIBRATION=c.json")
    assert f"{run} '{tmp_path}' --gpu --model-dir 'model' --calibration 'c.json'" in with_gpu
    assert f"{run} 'build/engines' --gpu --model-dir 'toyworld/checkpoint'" in commands("GPU=1")
    assert "--goldens" in commands()
    assert "--goldens" not in with_gpu


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt_rtx"])
def test_engines_on_this_gpu(backend: str, graphs: Path, checkpoint: Path, tmp_path: Path) -> None:
    major, minor = torch.cuda.get_device_capability()
    target = ("--backend", backend, "--sm", 10 * major + minor, "--only", *CHEAP)
    done = build(graphs, tmp_path / "out", *target)
    assert done.returncode == 0, done.stdout + done.stderr
    assert verify.main(["--engines", str(tmp_path / "out"), "--gpu", "--model-dir", str(checkpoint)]) == 0
    rows = Manifest.load(tmp_path / "out").graph("dit_block_00").extras["parity"]
    assert {row["backend"] for row in rows} == {"onnxruntime", "engine"}

"""`make verify GPU=1` on the stub, for the engines of every layout."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from export import verify
from stepvideo_serve.config import ServeConfig
from stepvideo_serve.engine.manifest import Manifest
from tests.fakes.machine import Machine

Load = Callable[..., ServeConfig]


def copy_of_the_dit(source: Path, engines: Path) -> Path:
    """Without the decoder, whose graph here is another than the network's."""
    shutil.copytree(source, engines)
    manifest = Manifest.load(engines)
    kept = {name: entry for name, entry in manifest.graphs.items() if name.startswith("dit_")}
    replace(manifest, graphs=kept).save(engines)
    return engines


@pytest.mark.usefixtures("gpu_machine")
@pytest.mark.parametrize("layout", ["single", "cfg2.sp2", "cfg2.tp2"])
def test_engines_that_are_right(layout: str, load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = load(layout).model
    engines = copy_of_the_dit(model.engines_dir, tmp_path / "engines")
    assert verify.main(["--engines", str(engines), "--gpu", "--model-dir", str(model.dir)]) == 0, capsys.readouterr()
    folders = [engines, *sorted(engines.glob("tp*of*"))]
    assert len(folders) == {"single": 1, "cfg2.sp2": 2, "cfg2.tp2": 3}[layout]
    for folder in folders:
        for entry in Manifest.load(folder).graphs.values():
            assert {row["backend"] for row in entry.extras["parity"]} == {"onnxruntime", "engine"}


def test_an_engine_that_is_wrong(
    load: Load, tmp_path: Path, gpu_machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its outputs are off by a hundredth."""
    model = load("single").model
    engines = copy_of_the_dit(model.engines_dir, tmp_path / "engines")
    gpu_machine.fake.scale_outputs = 1.01
    assert verify.main(["--engines", str(engines), "--gpu", "--model-dir", str(model.dir)]) == 1
    assert "dit_final" in capsys.readouterr().out

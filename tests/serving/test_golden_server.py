"""The official code's results, through the real server: one run of the tiny golden checkpoint from prompt to frames."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.server_deaths import WatchServer
from tests.serving.calls import Server, Values
from tests.serving.launch import CONFIG, MAX_QUEUED, exclusive, export_graphs, serving

LATENTS_ERROR = 1e-4  # of the largest value
FRAMES_LEVELS = 1
FRAMES_SHARE = 1e-3


@pytest.fixture(scope="module")
def goldens(shared: Path) -> Path:
    return shared / "goldens" / "tiny-a"


@pytest.fixture(scope="module")
def tensors(goldens: Path) -> dict[str, Any]:
    return load_file(goldens / "goldens.safetensors")


@pytest.fixture(scope="module")
def golden_server(
    root: Path, goldens: Path, tmp_path_factory: pytest.TempPathFactory, watch: WatchServer
) -> Iterator[Server]:
    with exclusive(root / "build" / "tests.lock"):
        engines = export_graphs(root, goldens, root / "build" / "onnx-tiny-a")
    config = CONFIG.format(model=engines.model_dir, engines=engines.graphs_dir, max_queued=MAX_QUEUED)
    with serving(root, tmp_path_factory.mktemp("golden"), config, watch) as running:
        yield Server(running.grpc_url, running.http_url, running.pid)


@pytest.fixture(scope="module")
def golden_run(goldens: Path, tensors: dict[str, Any]) -> Values:
    """The request that the golden run was made with."""
    settings = json.loads((goldens / "goldens.json").read_text(encoding="utf-8"))["e2e"]
    integers = {"NUM_FRAMES": "num_frames", "HEIGHT": "height", "WIDTH": "width", "STEPS": "steps"}
    reals = {"CFG_SCALE": "cfg", "TIME_SHIFT": "shift", "MOTION_SCORE": "motion"}
    texts = {"PROMPT": "prompt", "POSITIVE_SUFFIX": "pos_magic", "NEGATIVE_PROMPT": "neg_magic"}
    return {
        "IMAGE": (goldens / "images" / f"{settings['image']}.png").read_bytes(),
        **{name: settings[key].encode() for name, key in texts.items()},
        **{name: np.array([settings[key]], np.int32) for name, key in integers.items()},
        **{name: np.array([settings[key]], np.float32) for name, key in reals.items()},
        "LATENTS": tensors["e2e.init_latents"][0],
        "ENCODE_NOISE": tensors["e2e.encode_noise"][0],
    }


@pytest.mark.slow
def test_the_latents_are_the_official_ones(golden_server: Server, golden_run: Values, tensors: dict[str, Any]) -> None:
    steps = int(golden_run["STEPS"][0])
    expected = tensors[f"e2e.latents{steps}"][0]
    for outputs in (
        golden_server.stream_result({**golden_run, "OUTPUT": b"latents"}),
        golden_server.http({**golden_run, "OUTPUT": b"latents"}),
    ):
        np.testing.assert_allclose(outputs["LATENTS"], expected, rtol=0, atol=LATENTS_ERROR * np.abs(expected).max())


@pytest.mark.slow
def test_the_frames_are_the_official_ones(golden_server: Server, golden_run: Values, tensors: dict[str, Any]) -> None:
    frames = golden_server.stream_result({**golden_run, "OUTPUT": b"frames"})["FRAMES"]
    difference = np.abs(frames.astype(np.int16) - tensors["e2e.frames_u8"])
    assert difference.max() <= FRAMES_LEVELS
    assert np.count_nonzero(difference) <= FRAMES_SHARE * difference.size

"""What callers and operators of an earlier release wrote down is understood by this one: inputs, outputs, keys.

The tables are those of the first release that was handed out. A name may be added here when it is published, and none
may go without a line in CHANGELOG.md and docs/operations.md, "Upgrade and rollback".
"""

import re
import tomllib
from pathlib import Path

import pytest

from stepvideo_serve.config import ServeConfig

INPUTS = {
    "PROMPT": "STRING",
    "IMAGE": "STRING",
    "NEGATIVE_PROMPT": "STRING",
    "POSITIVE_SUFFIX": "STRING",
    "NUM_FRAMES": "INT32",
    "HEIGHT": "INT32",
    "WIDTH": "INT32",
    "STEPS": "INT32",
    "CFG_SCALE": "FP32",
    "TIME_SHIFT": "FP32",
    "MOTION_SCORE": "FP32",
    "SEED": "INT64",
    "LATENTS": "FP32",
    "ENCODE_NOISE": "FP32",
    "OUTPUT": "STRING",
    "PREVIEW_EVERY": "INT32",
    "TIMEOUT_S": "FP32",
    "REQUEST_PRIORITY": "INT32",
    "REQUEST_ID": "STRING",
}
NEEDED = {"PROMPT", "IMAGE"}
RESULT = {"VIDEO": "STRING", "FRAMES": "UINT8", "LATENTS": "FP32", "SEED": "INT64", "REPORT": "STRING"}
PROGRESS = {
    "STEP": "INT32",
    "TOTAL_STEPS": "INT32",
    "ELAPSED_S": "FP32",
    "QUEUE_POSITION": "INT32",
    "START_IN_S": "FP32",
    "PREVIEW": "STRING",
}
CONFIG = """
[model]
dir = "toyworld/checkpoint"
engines_dir = "build/toyworld"
backend = "ort"
precision = "fp32"
device = "cpu"
[limits]
max_frames = 204
max_height = 1088
max_width = 1920
max_tokens = 75888
max_steps = 200
max_image_bytes = 33554432
max_prompt_bytes = 16384
cfg_scale = [1.0, 30.0]
time_shift = [0.1, 100.0]
motion_score = [0.0, 100.0]
max_timeout_s = 86400.0
[text]
cache_entries = 64
on_ranks = false
[encoder]
cache_entries = 16
[denoiser]
threads = 0
max_queued = 8
max_parks = 2
aging_s = 600.0
start_timeout_s = 600.0
heartbeat_s = 0.5
first_step_timeout_s = 600.0
step_slack_s = 2.0
max_resumes = 2
arena_mib = 256
layout = "single"
peak_tflops = 0.0
[decoder]
threads = 0
[video]
fps = 25
crop = true
ffmpeg_threads = 4
[gates]
frame_count = "error"
mp4 = "error"
first_frame = "warn"
first_frame_psnr_db = 0.0
black = "warn"
black_level = 2.0
frozen = "warn"
frozen_difference = 0.1
[idempotency]
ttl_s = 600.0
max_mib = 256
[logging]
format = "text"
[telemetry]
otlp_endpoint = ""
sample_ratio = 1.0
steps_per_span = 10
"""


def declared(root: Path, model: str) -> tuple[dict[str, str], set[str], dict[str, str]]:
    """Inputs with their types, those that must be given, and outputs, of a model's config.pbtxt."""
    text = (root / "model_repository" / model / "config.pbtxt").read_text(encoding="utf-8")
    inputs, outputs = (
        re.search(rf"^{kind} \[(.*?)^\]", text, re.MULTILINE | re.DOTALL) for kind in ("input", "output")
    )
    assert inputs is not None
    assert outputs is not None
    pattern = re.compile(r'name: "(\w+)" data_type: TYPE_(\w+) dims: \[[^]]*\]( optional: true)?')
    found = pattern.findall(inputs[1])
    needed = {name for name, _, optional in found if not optional}
    return (
        {name: kind for name, kind, _ in found},
        needed,
        {name: kind for name, kind, _ in pattern.findall(outputs[1])},
    )


@pytest.mark.parametrize("model", ["ti2v", "ti2v_unary"])
def test_a_request_of_the_first_release_is_still_one(root: Path, model: str) -> None:
    inputs, needed, outputs = declared(root, model)
    assert INPUTS.items() <= inputs.items()
    assert needed == NEEDED, "an input that must be given would end every request of an older client"
    assert RESULT.items() <= outputs.items()
    if model == "ti2v":
        assert PROGRESS.items() <= outputs.items()


def test_a_configuration_of_the_first_release_is_still_one(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "serve.toml"
    path.write_text(CONFIG, encoding="utf-8")
    ServeConfig.load(path)
    now = tomllib.loads((root / "serve.toml").read_text(encoding="utf-8"))
    for section, keys in tomllib.loads(CONFIG).items():
        assert keys.keys() <= now[section].keys()

"""Loading takes little more memory than what is loaded, also where the weights change their type."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from export.tiny_checkpoint import save_weights
from tests.assembly.load_in_child import PART, SIDE

LAYERS = 12  # 384 MiB


@pytest.fixture(scope="module", params=[1, 4], ids=["single", "sharded"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    matrix = torch.ones(SIDE, SIDE, dtype=torch.bfloat16)
    save_weights(folder, "model", {f"layers.{i}.weight": matrix.clone() for i in range(LAYERS)}, request.param)
    assert len(list(folder.glob("*.safetensors"))) == request.param
    return folder


@pytest.mark.parametrize(
    ("dtype", "how"),
    [
        ("bfloat16", "whole"),
        ("float32", "whole"),
        ("bfloat16", "rows"),
        ("bfloat16", "sections"),
        ("bfloat16", "columns"),
        ("float32", "columns"),
    ],
)
def test_peak_memory_while_loading(folder: Path, root: Path, dtype: str, how: str) -> None:
    command = [sys.executable, "-m", "tests.assembly.load_in_child", str(folder), dtype, how]
    answer = json.loads(subprocess.run(command, cwd=root, check=True, capture_output=True, timeout=120).stdout)
    whole = LAYERS * SIDE * SIDE * getattr(torch, dtype).itemsize
    assert answer["loaded"] == (whole if how == "whole" else whole // PART.count)
    assert 0.9 * answer["loaded"] < answer["growth"] < 1.2 * answer["loaded"]

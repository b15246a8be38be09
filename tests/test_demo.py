"""The front door: the command that README gives a newcomer."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.video.decode import decode_mp4


@pytest.mark.slow
def test_make_demo_makes_a_playable_video(root: Path, tmp_path: Path) -> None:
    video = tmp_path / "demo.mp4"
    command = ["make", "demo", f"OUT={video}", "STEPS=2", "HEIGHT=64", "WIDTH=96"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert decode_mp4(video.read_bytes())[0].shape == (34, 64, 96, 3)
    report = json.loads(video.with_suffix(".json").read_text())
    assert report["backend"] == "ort"
    assert len(report["step_seconds"]) == 2
    assert str(report["seed"]) in done.stdout

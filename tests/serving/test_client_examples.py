"""The examples of docs/clients.md, run as they stand against the real server."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving.calls import Server, Values
from tests.video.decode import decode_mp4

HOW = {
    "python": [sys.executable, "-"],
    "bash": ["bash"],
    "javascript": ["node", "--input-type=module"],
    "go": ["go", "run", "video.go"],
}
FILES = {"go": "video.go"}  # what takes no program from standard input


@pytest.mark.parametrize("language", HOW)
def test_an_example_makes_the_video(
    root: Path, server: Server, small: Values, picture: bytes, tmp_path: Path, language: str
) -> None:
    if shutil.which(HOW[language][0]) is None:
        pytest.skip(f"needs {HOW[language][0]}")
    text = (root / "docs" / "clients.md").read_text(encoding="utf-8")
    [example] = re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert "127.0.0.1:800" in example
    example = example.replace("127.0.0.1:8001", server.grpc_url).replace("127.0.0.1:8000", server.http_url)
    (tmp_path / "first.png").write_bytes(picture)
    (tmp_path / FILES.get(language, "program")).write_text(example, encoding="utf-8")
    done = subprocess.run(
        HOW[language], input=example, text=True, capture_output=True, cwd=tmp_path, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    request: Values = {
        "PROMPT": "一只猫在窗台上伸懒腰。".encode(),
        "IMAGE": picture,
        "SEED": small["SEED"],
        "OUTPUT": b"mp4",
    }
    video = (tmp_path / "video.mp4").read_bytes()
    assert video == server.grpc(request)["VIDEO"][0]
    assert decode_mp4(video)[0].shape == (17, 64, 96, 3)

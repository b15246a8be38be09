"""What the server's processes load: eight of them start at the same time, so each import costs every start."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving.calls import Server

MODULES = (
    "stepvideo_serve.assembly.stages",
    "stepvideo_serve.pipeline.generate",
    "stepvideo_serve.assembly.denoiser_rank",
)


def loaded_by(module: str, root: Path) -> set[str]:
    """The modules that are there after an import, in a fresh interpreter."""
    command = [sys.executable, "-c", f"import sys, {module}; print(*sys.modules)"]
    return set(subprocess.run(command, cwd=root, stdout=subprocess.PIPE, check=True, text=True).stdout.split())


@pytest.mark.parametrize("module", MODULES)
def test_only_the_text_encoder_pays_for_transformers(module: str, root: Path) -> None:
    assert "transformers" not in loaded_by(module, root)


def test_the_process_that_drives_the_ranks_has_no_torch(server: Server) -> None:
    maps = {Path(region.path).name for region in server.process("/dit_denoiser/").memory_maps()}
    assert any(library.startswith("libpython") for library in maps)
    assert not any(library.startswith("libtorch") for library in maps)

"""What tests on a GPU share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def kernels(root: Path) -> Path:
    """The folder of `make kernels`."""
    folder = root / "build" / "kernels"
    if not folder.is_dir():
        pytest.fail("build/kernels must hold machine code, it does not exist: run `make kernels` first.")
    return folder

"""What every test may ask for."""

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest

pytest_plugins = ["tests.server_deaths"]
os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # for tests that import onnxruntime themselves

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The top of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden tensors and prompts: $STEPVIDEO_SHARED, or `shared` beside the checkout.

    A user's clone has none, and the test is skipped; in CI (CI=true) it has to be there.
    """
    folder = Path(os.environ.get("STEPVIDEO_SHARED", ROOT.parent / "shared"))
    if folder.is_dir():
        return folder
    reason = f"needs the golden data at {folder}: put it there, or set STEPVIDEO_SHARED"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of `make demo`, for reading only."""
    from export.tiny_checkpoint import make

    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    make(folder)
    return folder


@pytest.fixture(scope="session")
def mini_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A still smaller one (tests/mini.py), for reading only."""
    from export.tiny_checkpoint import write_checkpoint
    from tests.mini import MINI

    folder = tmp_path_factory.mktemp("checkpoints") / "mini"
    write_checkpoint(folder, MINI)
    return folder


@pytest.fixture(scope="session")
def bench(root: Path) -> ModuleType:
    """kernels/bench.py, which is a program beside its package."""
    spec = importlib.util.spec_from_file_location("kernels_bench", root / "kernels" / "bench.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

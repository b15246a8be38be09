"""The key by which a graph is recognised as up to date: which code it covers, and that the Makefile covers the same."""

import shutil
import subprocess
from pathlib import Path

import pytest

import export
import stepvideo_kernels
import stepvideo_serve
from export.graphs.recipe import EXPORT_SOURCES, KERNEL_SOURCES, QUANTIZE_SOURCES, SOURCES, Recipe, digest_of
from export.quantize.calibration import Calibration
from export.quantize.fp8 import Fp8
from stepvideo_kernels.choice import Target
from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.assembly.graphs import components
from stepvideo_serve.errors import ExportError

PATTERNS = {
    "stepvideo_serve": SOURCES,
    "export": (*EXPORT_SOURCES, *QUANTIZE_SOURCES),
    "kernels/stepvideo_kernels": KERNEL_SOURCES,
}
PAIRS = [(folder, pattern) for folder, patterns in PATTERNS.items() for pattern in patterns]


def covered(root: Path) -> set[str]:
    """Paths in the checkout of all code that the key of some graph covers."""
    return {path.relative_to(root).as_posix() for folder, pattern in PAIRS for path in (root / folder).glob(pattern)}


@pytest.fixture
def copy(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the code, of which the keys are made."""
    for folder, package in zip(PATTERNS, (stepvideo_serve, export, stepvideo_kernels), strict=True):
        shutil.copytree(root / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
        monkeypatch.setattr(package, "__file__", str(tmp_path / folder / "__init__.py"))
    return tmp_path


def test_the_makefile_makes_graphs_again_for_the_same_code(root: Path) -> None:
    show = "--eval=graph-code: ; @printf '%s\\n' $(GRAPH_CODE)"
    done = subprocess.run(["make", "-s", show, "graph-code"], cwd=root, capture_output=True, text=True, check=True)
    assert covered(root) <= set(done.stdout.split())


@pytest.mark.parametrize(("folder", "pattern"), PAIRS)
def test_each_pattern_matches(root: Path, folder: str, pattern: str) -> None:
    digest_of(root / folder, (pattern,))


def test_a_pattern_without_a_match_is_an_error(root: Path) -> None:
    with pytest.raises(ExportError, match=r"must match gone/\*\.py in .*stepvideo_serve, no file does: correct"):
        digest_of(root / "stepvideo_serve", ("geometry.py", "gone/*.py"))


def test_an_edit_of_each_covered_file_changes_the_key(copy: Path, mini_checkpoint: Path) -> None:
    checkpoint = Checkpoint(mini_checkpoint)
    graph = components(checkpoint, "bf16")["vae_encoder"]
    recipe = Recipe("fp8", Fp8(Calibration({}, {}, {})), target=Target(89, "tensorrt_rtx"))
    before = recipe.key(graph, checkpoint)
    for name in sorted(covered(copy)):
        path = copy / name
        content = path.read_bytes()
        path.write_bytes(content + b"# edited\n")
        assert recipe.key(graph, checkpoint) != before, name
        path.write_bytes(content)
    (copy / "stepvideo_serve" / "config.py").write_text("# edited\n", encoding="utf-8")
    assert recipe.key(graph, checkpoint) == before, "a file that shapes no graph"

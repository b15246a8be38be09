"""What CI prints: every part's result, whatever failed before it, coverage by folder, and what cannot be installed."""

import os
import re
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.coverage_by_folder import by_folder, table
from tests.resolve_extras import NO_WHEEL, NOT_ON_THE_INDEX, ask_pip, name_of, problems, requirements_of


def run(root: Path, parts: str, minutes: int) -> tuple[int, list[str]]:
    """The exit status of .ci/run with these targets of make, and what it says of each."""
    environment = os.environ | {"CI_PARTS": parts, "CI_MINUTES": str(minutes)}
    done = subprocess.run([str(root / ".ci/run")], env=environment, capture_output=True, text=True, check=False)
    found = re.findall(r"^\S+ +\d+ s  (.+)$", done.stdout.partition("=== wall time")[2], re.MULTILINE)
    return done.returncode, found


def test_a_failed_part_hides_no_other(root: Path) -> None:
    assert run(root, "no-such-target help", 1) == (1, ["FAILED", "passed", "of 60 s"])
    assert run(root, "help", 1) == (0, ["passed", "of 60 s"])


def test_what_runs_beside_counts_too(root: Path) -> None:
    status, said = run(root, "help &no-such-target,help help", 1)
    assert (status, sorted(said)) == (1, ["FAILED", "of 60 s", "passed", "passed", "passed"])
    assert run(root, "&help help", 1) == (0, ["passed", "passed", "of 60 s"])


def test_what_has_no_time_left_has_not_passed(root: Path) -> None:
    assert run(root, "help", 0) == (1, ["not run, no time left", "of 0 s"])


def test_coverage_is_added_up_by_folder() -> None:
    def measured(lines: int, seen: int, branches: int, taken: int) -> dict[str, dict[str, int]]:
        sums = {"num_statements": lines, "covered_lines": seen, "num_branches": branches, "covered_branches": taken}
        return {"summary": sums}

    files = {"a/b/x.py": measured(10, 9, 4, 1), "a/b/y.py": measured(10, 10, 0, 0), "a/z.py": measured(3, 2, 0, 0)}
    _, *rows = (line.split() for line in table(by_folder(files)))
    assert rows == [
        ["a", "3", "66", "%", "0", "-"],
        ["a/b", "20", "95", "%", "4", "25", "%"],
        ["all", "23", "91", "%", "4", "25", "%"],
    ]


CUDA_TORCH: dict[str, Any] = {
    "version": "2.13.0",
    "requires_dist": ["filelock", 'nvidia-nccl-cu13==2.29.7; platform_system == "Linux"'],
}


def test_what_is_pinned_is_asked_for(root: Path) -> None:
    asked = requirements_of(root / "pyproject.toml", root / "client/pyproject.toml")
    names = {name_of(one) for one in asked}
    assert {"torch", "onnx", "tensorrt-rtx-cu13-libs", "cuda-bindings", "pytest", "tritonclient"} <= names
    assert names.isdisjoint({*NOT_ON_THE_INDEX, "stepvideo-serve", "triton"})
    text = (root / "pyproject.toml").read_text(encoding="utf-8")
    assert all(f'"{name}==' in text for name in (*NOT_ON_THE_INDEX, *NO_WHEEL)), (
        "what is left out is named by the project"
    )


def test_an_answer_that_is_not_the_pinned_one_is_no_answer() -> None:
    found: dict[str, dict[str, Any]] = {"torch": CUDA_TORCH, "numpy": {"version": "2.1.0"}}
    assert problems(["torch==2.13.0", "numpy>=1.26"], found) == []
    assert problems(["numpy==1.26.4"], found) == ["numpy==1.26.4 was asked for, 2.1.0 would be installed"]
    assert problems(["Pillow>=11"], found) == ["Pillow>=11 was asked for, none would be installed"]


def test_a_torch_for_cpus_is_no_answer() -> None:
    metadata: list[dict[str, Any]] = [{"version": "2.13.0", "requires_dist": ["filelock"]}, {"version": "2.13.0+cpu"}]
    for torch in metadata:
        assert "torch must be a build for CUDA" in problems([], {"torch": torch})[0]


def test_pip_is_heard_when_it_finds_none(tmp_path: Path) -> None:
    """Two versions of one package cannot be installed together; no index is asked."""
    for version in ("1.0", "2.0"):
        make_wheel(tmp_path, "contested", version)
    offline = ["--no-index", f"--find-links={tmp_path}"]
    with pytest.raises(SystemExit, match=r"pip says they are not:\n(?s:.*)contested"):
        ask_pip([*offline, "contested==1.0", "contested==2.0"], tmp_path / "report.json", os.environ)
    ask_pip([*offline, "contested"], tmp_path / "report.json", os.environ)
    assert '"2.0"' in (tmp_path / "report.json").read_text()


def make_wheel(folder: Path, name: str, version: str) -> None:
    """An empty distribution."""
    information = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{information}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{information}/RECORD", "")

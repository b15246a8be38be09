"""What CI prints: every part's result, whatever failed before it, and coverage by folder."""

import os
import re
import subprocess
from pathlib import Path

from tests.coverage_by_folder import by_folder, table


def run(root: Path, parts: str, minutes: int) -> tuple[int, list[str]]:
    """The exit status of .ci/run with these targets of make, and what it says of each."""
    environment = os.environ | {"CI_PARTS": parts, "CI_MINUTES": str(minutes)}
    done = subprocess.run([str(root / ".ci/run")], env=environment, capture_output=True, text=True, check=False)
    found = re.findall(r"^\S+ +\d+ s  (.+)$", done.stdout.partition("=== wall time")[2], re.MULTILINE)
    return done.returncode, found


def test_a_failed_part_hides_no_other(root: Path) -> None:
    assert run(root, "no-such-target help", 1) == (1, ["FAILED", "passed", "of 60 s"])
    assert run(root, "help", 1) == (0, ["passed", "of 60 s"])


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

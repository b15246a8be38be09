"""Line and branch coverage by folder, from the report of `coverage json`.

python -m tests.coverage_by_folder build/coverage/coverage.json
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

NOT_SEEN = """Not seen, though it may run:
- what a process did that ended by SIGKILL: ranks and stubs that tests kill, and all that die with them;
- lines that only a GPU or TensorRT reaches (make test-gpu), and the slow tests;
- compiled kernels and graphs, shell scripts, programs that tests give as text."""


def by_folder(files: Mapping[str, Any]) -> dict[str, Counter[str]]:
    """The figures of coverage's report, added up for each folder that has files, and for all of them as "all"."""
    folders: dict[str, Counter[str]] = {}
    for path, measured in files.items():
        for folder in (str(PurePath(path).parent), "all"):
            folders.setdefault(folder, Counter()).update(measured["summary"])
    return {folder: folders[folder] for folder in sorted(folders, key=lambda name: (name == "all", name))}


def table(folders: Mapping[str, Counter[str]]) -> Iterator[str]:
    yield f"{'folder':<44} {'lines':>7} {'seen':>6} {'branches':>9} {'seen':>6}"
    for folder, sums in folders.items():
        lines, branches = sums["num_statements"], sums["num_branches"]
        shares = share(sums["covered_lines"], lines), share(sums["covered_branches"], branches)
        yield f"{folder:<44} {lines:>7} {shares[0]:>6} {branches:>9} {shares[1]:>6}"


def share(part: int, whole: int) -> str:
    """Rounded down, so that 100 % means all."""
    return f"{100 * part // whole} %" if whole else "-"


def main() -> None:
    report = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print("\n".join([*table(by_folder(report["files"])), NOT_SEEN]))


if __name__ == "__main__":
    main()

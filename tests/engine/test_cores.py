"""How many cores a process may use: the least of the machine, what it is bound to, and its quotas."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stepvideo_serve.engine.cores import usable_cores
from tests.test_architecture import ROOT, code, parse

ALL = len(os.sched_getaffinity(0))
ASK = "from stepvideo_serve.engine.cores import usable_cores; print(usable_cores())"
OTHER_ANSWERS = (
    "os.cpu_count",
    "os.sched_getaffinity",
    "os.process_cpu_count",
    "multiprocessing.cpu_count",
    "psutil.cpu_count",
    "torch.get_num_threads",
)


class Process:
    """A folder like /proc/self of a process in a control group."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "proc"
        self.folder.mkdir()
        self.mount = folder / "mounted here"
        self.mount.mkdir()

    def v2(self, path: str, root: str = "/") -> None:
        self._write(f"0::{path}", f"{root} {self._escaped()} rw,relatime - cgroup2 cgroup2 rw")

    def v1(self, path: str, root: str = "/") -> None:
        lines = f"9:name=systemd:/\n4:cpu,cpuacct:{path}\n3:memory:/other\n0::/"
        self._write(lines, f"{root} {self._escaped()} rw - cgroup cgroup rw,cpu,cpuacct")

    def limit(self, group: str, **files: str) -> None:
        folder = self.mount / group
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / f"cpu.{name}").write_text(text + "\n", encoding="utf-8")

    def _write(self, groups: str, mount: str) -> None:
        (self.folder / "cgroup").write_text(groups + "\n", encoding="utf-8")
        (self.folder / "mountinfo").write_text(f"30 20 0:28 {mount}\n", encoding="utf-8")

    def _escaped(self) -> str:
        return str(self.mount).replace(" ", r"\040")


@pytest.fixture
def process(tmp_path: Path) -> Process:
    return Process(tmp_path)


needs_two = pytest.mark.skipif(ALL < 2, reason="a limit of one core shows on two")


def test_without_limits_all_that_it_is_bound_to_count(process: Process, tmp_path: Path) -> None:
    assert usable_cores(tmp_path / "no proc at all") == ALL
    process.v2("/job")
    process.limit("job", max="max 100000")
    assert usable_cores(process.folder) == ALL
    process.v1("/job")
    process.limit("job", cfs_quota_us="-1", cfs_period_us="100000")
    assert usable_cores(process.folder) == ALL


@needs_two
@pytest.mark.parametrize("quota", ["100000 100000", "199000 100000", "50000 50000", "1000 100000"])
def test_a_quota_of_version_2_is_rounded_down_to_at_least_one(process: Process, quota: str) -> None:
    process.v2("/pod/job")
    process.limit("pod/job", max=quota)
    assert usable_cores(process.folder) == 1


@needs_two
def test_a_quota_of_version_1(process: Process) -> None:
    process.v1("/job")
    process.limit("job", cfs_quota_us="150000", cfs_period_us="100000")
    assert usable_cores(process.folder) == 1


@needs_two
def test_the_groups_above_limit_too(process: Process) -> None:
    process.v2("/pod/job")
    process.limit("pod/job", max="max 100000")
    process.limit("pod", max="100000 100000")
    assert usable_cores(process.folder) == 1


@needs_two
@pytest.mark.parametrize("root", ["/", "/docker/4f5e"])
def test_in_a_container(process: Process, root: str) -> None:
    """Its own group is mounted as the root; the path may be that of the host, or empty with a namespace of its own."""
    process.v2("/docker/4f5e" if root != "/" else "/", root)
    process.limit(".", max="100000 100000")
    assert usable_cores(process.folder) == 1


@needs_two
@pytest.mark.parametrize("text", ["", "max", "a b", "100000 0", "-5 100000"])
def test_what_cannot_be_understood_limits_nothing(process: Process, text: str) -> None:
    process.v2("/job")
    process.limit("job", max=text)
    assert usable_cores(process.folder) == ALL


@needs_two
def test_a_bound_process() -> None:
    """A real one, on one of the cores."""
    core = str(min(os.sched_getaffinity(0)))
    done = subprocess.run(
        ["taskset", "-c", core, sys.executable, "-c", ASK], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == "1\n"


@pytest.fixture
def group_of_one_core() -> Iterator[Path]:
    """A real control group with a quota, where this user may make one."""
    folder = Path(f"/sys/fs/cgroup/cpu/stepvideo-test-{os.getpid()}")
    if not folder.parent.is_dir() or not os.access(folder.parent, os.W_OK):
        pytest.skip("needs a writable hierarchy of control groups, version 1")
    folder.mkdir()
    try:
        (folder / "cpu.cfs_quota_us").write_text("150000")
        yield folder
    finally:
        folder.rmdir()


@needs_two
def test_a_real_quota(group_of_one_core: Path) -> None:
    command = f"echo $$ > {group_of_one_core}/cgroup.procs && exec '{sys.executable}' -c '{ASK}'"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "1\n"


def test_nobody_else_counts_cores() -> None:
    """The kind: each part with an answer of its own."""
    own = ROOT / "stepvideo_serve/engine/cores.py"
    asked = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in code()
        if path != own
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in OTHER_ANSWERS
    ]
    assert not asked, "use stepvideo_serve.engine.cores.usable_cores"

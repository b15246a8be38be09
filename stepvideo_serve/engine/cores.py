"""How many cores this process may use; asked by ranks, encoders, ffmpeg, export, builds and benchmarks."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

_OCTAL = re.compile(r"\\([0-7]{3})")  # how mountinfo writes spaces in paths


def usable_cores(process: Path = Path("/proc/self")) -> int:
    """The least of the machine's cores, those that the process is bound to, and the quota of its control groups (v1 and
    v2, rounded down: threads above a quota stop each other); at least 1.

    process  the folder under /proc of the process whose control groups count
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [int(quota) for quota in _quotas(process)]
    return max(min(os.cpu_count() or 1, bound, *quotas), 1)


def _quotas(process: Path) -> Iterator[float]:
    """Cores that the process's control group and each group above it allow, where they have a limit."""
    for controllers, path in _groups(process):
        for mount, root in _mounts(process, controllers):
            relative = path.removeprefix(root.rstrip("/")).strip("/")
            group = mount / relative
            if not group.is_dir():  # in a container without a namespace of its own the path is that of the host
                group = mount
            for folder in (group, *group.parents):
                if folder == mount.parent:
                    break
                quota = _quota_v2(folder) if controllers == "" else _quota_v1(folder)
                if quota is not None:
                    yield quota


def _groups(process: Path) -> Iterator[tuple[str, str]]:
    """Controllers ("" for version 2) and path of the groups that may limit processor time."""
    for line in _read(process / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "cpu" in controllers.split(","):
            yield controllers, path


def _mounts(process: Path, controllers: str) -> Iterator[tuple[Path, str]]:
    """Where the hierarchy of these controllers is mounted, and which of its groups is at the mount point."""
    for line in _read(process / "mountinfo").splitlines():
        fields, _, rest = line.partition(" - ")
        kind, _, options = rest.partition(" ")
        wanted = kind == "cgroup2" if controllers == "" else kind == "cgroup" and "cpu" in re.split(r"[, ]", options)
        if wanted:
            root, mount = (_OCTAL.sub(lambda code: chr(int(code[1], 8)), part) for part in fields.split(" ")[3:5])
            yield Path(mount), root


def _quota_v2(group: Path) -> float | None:
    """cpu.max: "max 100000" or microseconds of processor time in each period of so many."""
    match _read(group / "cpu.max").split():
        case [quota, period] if quota.isdecimal() and period.isdecimal() and int(period) > 0:
            return int(quota) / int(period)
    return None


def _quota_v1(group: Path) -> float | None:
    quota, period = (_read(group / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    if quota.isdecimal() and period.isdecimal() and int(period) > 0:  # no limit is -1
        return int(quota) / int(period)
    return None


def _read(path: Path) -> str:
    """The text of a file, "" where it cannot be read: a group that tells no limit sets none that we could obey."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""

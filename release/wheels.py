"""Wheels of all distributions: stepvideo-serve, stepvideo-client, stepvideo-gateway.

    python -m release.wheels [--out build/dist]

They are built from a copy of the sources, so that nothing of earlier builds gets in, by the setuptools of this
environment (torch brings it), so that no package index is asked. `--out` then holds these wheels and no older ones.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from stepvideo_serve.errors import SetupError

ROOT = Path(__file__).resolve().parents[1]
# Folder of a distribution -> what its wheel is built from, below that folder. LICENSE joins each.
DISTRIBUTIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        ".": (*("pyproject.toml", "setup.py", "README.md"), *("stepvideo_serve", "model_repository", "kernels")),
        "client": ("pyproject.toml", "README.md", "stepvideo_client"),
        "gateway": ("pyproject.toml", "README.md", "stepvideo_gateway"),
    }
)


def build(out: Path, root: Path = ROOT) -> list[Path]:
    """The wheels, in the order of DISTRIBUTIONS. Raises SetupError with pip's words for one that cannot be built."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        built = [_wheel(root, name, Path(folder, str(number))) for number, name in enumerate(DISTRIBUTIONS)]
        for old in out.glob("stepvideo_*.whl"):
            old.unlink()
        return [Path(shutil.move(wheel, out / wheel.name)) for wheel in built]


def _wheel(root: Path, distribution: str, folder: Path) -> Path:
    sources, wheels = folder / "sources", folder / "wheels"
    sources.mkdir(parents=True)
    for path in [root / distribution / name for name in DISTRIBUTIONS[distribution]] + [root / "LICENSE"]:
        if path.is_dir():
            shutil.copytree(path, sources / path.name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(path, sources / path.name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    command += ["--disable-pip-version-check", "--wheel-dir", str(wheels), str(sources)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SetupError(f"The wheel of {root / distribution} must be built, pip says: {done.stderr.strip()}")
    [wheel] = wheels.glob("*.whl")
    return wheel


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code; prints the wheels."""
    parser = argparse.ArgumentParser(prog="python -m release.wheels", description="Build the wheels.")
    parser.add_argument("--out", type=Path, default=Path("build/dist"), help="default: %(default)s")
    args = parser.parse_args(arguments)
    try:
        for wheel in build(args.out):
            print(f"{wheel} ({wheel.stat().st_size / 2**10:.0f} KiB)")
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

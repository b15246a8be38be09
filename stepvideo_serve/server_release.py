"""Whether a Triton release may be reached from other machines.

Releases before 26.07 have published vulnerabilities that a request over the network can use. They serve on loopback,
for development and tests, and refuse other addresses unless told otherwise.
"""

import ipaddress
from pathlib import Path

from stepvideo_serve.errors import SetupError

MINIMUM = (2, 71)
MINIMUM_NAME = "26.07 (2.71)"
ADVISORIES = "CVE-2025-23319, CVE-2025-23320, CVE-2025-23334, CVE-2026-24207, CVE-2026-24208, CVE-2026-16497"


def server_version(home: Path) -> tuple[int, int] | None:
    """Major and minor version of the server in `home`, from the file TRITON_VERSION of NVIDIA's images; None where the
    file is missing, as in the wheel, or says something else."""
    try:
        major, minor = (home / "TRITON_VERSION").read_text(encoding="ascii").strip().split(".")[:2]
        return int(major), int(minor)
    except (OSError, ValueError):
        return None


def outdated(home: Path) -> str | None:
    """A sentence about the vulnerabilities of the server in `home`; None if it is recent enough."""
    version = server_version(home)
    if version is not None and version >= MINIMUM:
        return None
    found = "of unknown version" if version is None else f"{version[0]}.{version[1]}"
    return f"This Triton server is {found}; before {MINIMUM_NAME} it has known vulnerabilities ({ADVISORIES})"


def check_exposure(home: Path, address: str, allow_outdated: bool) -> None:
    """Raises SetupError where an outdated server would listen on anything but loopback, unless that is allowed."""
    sentence = outdated(home)
    if sentence is None or allow_outdated or is_loopback(address):
        return
    raise SetupError(
        f"{sentence}, so it must listen on loopback, got the address {address}: use {MINIMUM_NAME} or later, or add "
        "--allow-outdated-server."
    )


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach the address; a name that is not an IP address counts only as "localhost"."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"

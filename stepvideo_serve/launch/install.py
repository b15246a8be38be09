"""Where Triton Inference Server is on this machine, what it needs to run this package in its Python stubs, and whether
its release may be reached from other machines.

Releases before 26.07 have published vulnerabilities that a request over the network can use. They serve on loopback,
for development and tests, and refuse other addresses unless told otherwise.
"""

import importlib.util
import ipaddress
import os
import site
import sys
import sysconfig
import tempfile
from pathlib import Path

from stepvideo_serve.errors import SetupError
from stepvideo_serve.launch.boundary import VARIABLE, new_token

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


def check_ascii(model_repository: Path) -> None:
    """Raises SetupError for paths that the Python of Triton's stubs cannot name: their file system encoding is ASCII,
    whatever the locale says. The configuration and what it names may be anywhere (config.py)."""
    places = {
        "model repository": model_repository.absolute(),
        "package stepvideo_serve": Path(__file__).absolute().parents[2],
        "Python environment": Path(sys.prefix),
        "folder for temporary files": Path(tempfile.gettempdir()),
    }
    for what, path in places.items():
        if not str(path).isascii():
            raise SetupError(
                f"The {what} must be at a path of ASCII characters, because Triton's Python reads no others, "
                f"got {path}: {'set TMPDIR to another' if 'temporary' in what else 'move it'}."
            )


QUIET = {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
"""What keeps the libraries of the server from calling their makers (SECURITY.md)."""

IMAGE_SERVER = Path("/opt/tritonserver")
STUB = "triton_python_backend_stub"


def server_home() -> Path:
    """The folder with bin/tritonserver: of the production image, else of the nvidia-pytriton wheel."""
    if (IMAGE_SERVER / "bin/tritonserver").is_file():
        return IMAGE_SERVER
    wheel = importlib.util.find_spec("pytriton")
    if wheel is None or wheel.origin is None:
        raise SetupError(
            f"tritonserver must be in {IMAGE_SERVER} or in the nvidia-pytriton package, and is in neither: "
            "run inside the server's image, or `pip install stepvideo-serve[cpu]`."
        )
    return Path(wheel.origin).parent / "tritonserver"


def stub_of(home: Path) -> Path | None:
    """The stub of the running Python version, seen from where the python backend looks for it. None in the production
    image, which has the one that it needs in place; the wheel has one per Python version. Raises SetupError where it
    has none for this one."""
    stubs = home / "python_backend_stubs"
    if not stubs.is_dir():
        return None
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if not (stubs / version / STUB).is_file():
        have = ", ".join(sorted(path.name for path in stubs.iterdir()))
        raise SetupError(f"The server must have a stub for Python {version}, but has {have}: use one of these.")
    return Path("../../python_backend_stubs") / version / STUB


def link_stub(home: Path) -> None:
    """Puts the stub of the running Python version where the python backend looks for it. Raises SetupError."""
    target, link = stub_of(home), home / "backends/python" / STUB
    if target is None:
        return
    if link.is_symlink() and link.readlink() == target:
        return
    fresh = link.with_name(f"{STUB}.{os.getpid()}")
    try:
        fresh.unlink(missing_ok=True)  # of a launcher that was killed and had this number, as in containers
        fresh.symlink_to(target)
        fresh.replace(link)  # atomic: another server may be starting from the same environment
    except OSError as error:
        raise SetupError(
            f"{link} must become a link to {target}, but {error.strerror}: make that link as the owner of the folder."
        ) from None


def server_environment(config: Path | None) -> dict[str, str]:
    """The server's environment: its stubs find this Python, its library, this package and the configuration, and its
    models each other, by a token that no other server has.

    Only the server of the wheel needs to be told where Python's library is. In the image that folder holds the host's
    CUDA driver, and the loader must go on to find the image's newer one first, where the host's is older.
    """
    environment = {**os.environ, VARIABLE: new_token()}
    _prepend(environment, "PATH", str(Path(sys.executable).parent))
    if server_home() != IMAGE_SERVER:
        _prepend(environment, "LD_LIBRARY_PATH", sysconfig.get_config_var("LIBDIR"))
    root = Path(__file__).absolute().parents[2]
    if root not in map(Path, site.getsitepackages()):
        _prepend(environment, "PYTHONPATH", str(root))
    environment |= QUIET | {"PYTHONUTF8": "1"}  # of the ranks: the stubs ignore it
    if config is not None:
        environment["STEPVIDEO_CONFIG"] = str(config.absolute())
    return environment


def _prepend(environment: dict[str, str], name: str, folder: str) -> None:
    old = environment.get(name)
    environment[name] = f"{folder}{os.pathsep}{old}" if old else folder

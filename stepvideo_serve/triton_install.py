"""Where Triton Inference Server is on this machine, and what it needs to run this package in its Python stubs."""

import importlib.util
import os
import site
import sys
import sysconfig
from pathlib import Path

from stepvideo_serve.errors import SetupError

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


def link_stub(home: Path) -> None:
    """Puts the stub of the running Python version where the python backend looks for it.

    The production image has the one stub that it needs; the wheel has one per Python version.
    """
    stubs = home / "python_backend_stubs"
    if not stubs.is_dir():
        return
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    target = Path("../../python_backend_stubs") / version / STUB
    link = home / "backends/python" / STUB
    if not (stubs / version / STUB).is_file():
        have = ", ".join(sorted(path.name for path in stubs.iterdir()))
        raise SetupError(f"The server must have a stub for Python {version}, but has {have}: use one of these.")
    if link.is_symlink() and link.readlink() == target:
        return
    fresh = link.with_name(f"{STUB}.{os.getpid()}")
    try:
        fresh.symlink_to(target)
        fresh.replace(link)  # atomic: another server may be starting from the same environment
    except OSError as error:
        raise SetupError(
            f"{link} must become a link to {target}, but {error.strerror}: make that link as the owner of the folder."
        ) from None


def server_environment(config: Path | None) -> dict[str, str]:
    """The server's environment: its stubs find this Python, its library, this package and the configuration."""
    environment = {**os.environ}
    _prepend(environment, "PATH", str(Path(sys.executable).parent))
    _prepend(environment, "LD_LIBRARY_PATH", sysconfig.get_config_var("LIBDIR"))
    root = Path(__file__).absolute().parents[1]
    if root not in map(Path, site.getsitepackages()):
        _prepend(environment, "PYTHONPATH", str(root))
    if config is not None:
        environment["STEPVIDEO_CONFIG"] = str(config.absolute())
    return environment


def _prepend(environment: dict[str, str], name: str, folder: str) -> None:
    old = environment.get(name)
    environment[name] = f"{folder}{os.pathsep}{old}" if old else folder

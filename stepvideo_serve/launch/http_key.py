"""What a call over HTTP must carry where HTTP is not for everybody (mutual TLS: options.py).

The launcher leaves it in a folder that only its own user may enter, in a file named by the port; probes and supervisors
of that user find it there, whoever started them. Nobody else does.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from stepvideo_serve.launch.install import is_loopback

FOLDERS = "stepvideo_*"  # in the folder for temporary files: stopping.py


def leave_http_key(folder: Path, port: int, headers: Mapping[str, str]) -> None:
    """Writes the file for the server whose HTTP listens on `port`. The folder must be nobody else's."""
    (folder / _name(port)).write_text(json.dumps(dict(headers)), encoding="utf-8")


def find_http_key(host: str, port: int) -> dict[str, str]:
    """The headers for calls to HTTP at this address; none where none are needed, or they are not this user's to know.
    They never leave the machine."""
    if not is_loopback(host):
        return {}
    try:
        found = [path for path in Path(tempfile.gettempdir()).glob(f"{FOLDERS}/{_name(port)}") if _is_trusted(path)]
        newest = max(found, key=lambda path: path.stat().st_mtime)  # the folder of a killed launcher stays
        values = json.loads(newest.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(name): str(value) for name, value in values.items()} if isinstance(values, dict) else {}


def _name(port: int) -> str:
    return f"http_{port}.json"


def _is_trusted(path: Path) -> bool:
    """Another user may have made a folder of such a name."""
    return os.geteuid() in (0, path.stat().st_uid)

"""A PostgreSQL server of Debian's package, in a folder of its own, on loopback."""

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

USER = "postgres"


def programs() -> Path | None:
    """The folder with initdb and postgres; None where PostgreSQL is not installed."""
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).resolve().parent
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return folders[-1] if folders else None


def installed() -> Path:
    """The same, for tests that need PostgreSQL: they are skipped without one, and fail in CI."""
    found = programs()
    if found is not None:
        return found
    reason = "needs PostgreSQL: apt-get install postgresql"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@dataclass
class Postgres:
    """A running server; `url` for SQLAlchemy."""

    bin: Path
    data: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://{USER}@127.0.0.1:{self.port}/{USER}"

    def kill(self) -> None:
        """As a power cut would."""
        if self.process is not None:
            own = psutil.Process(self.process.pid)
            for process in (own, *own.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self.process.wait()
            self.process = None

    def start(self) -> None:
        """Starts the server, again perhaps, and waits until it answers. After a kill it refuses to start until the last
        of its old processes has gone."""
        (self.data / "postmaster.pid").unlink(missing_ok=True)
        deadline_s = time.monotonic() + 60.0
        ask = [str(self.bin / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        while subprocess.run(ask, check=False).returncode != 0:
            assert time.monotonic() < deadline_s, "PostgreSQL must answer within 60 s"
            if self.process is None or self.process.poll() is not None:
                line = _server(self.bin, self.data, self.port)
                self.process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
            time.sleep(0.1)


@contextmanager
def postgres(programs: Path) -> Iterator[Postgres]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = Path(tempfile.mkdtemp(prefix="gateway_pg_"))
    data = folder / "data"
    data.mkdir(mode=0o700)
    if os.geteuid() == 0:  # PostgreSQL does not run as root
        user = pwd.getpwnam(USER)
        for path in (folder, data):
            os.chown(path, user.pw_uid, user.pw_gid)
    initdb = [str(programs / "initdb"), "-D", str(data), "-U", USER, "--auth=trust", "--no-sync"]
    subprocess.run(_as_user(initdb), check=True, stdout=subprocess.DEVNULL, cwd=folder)
    server = Postgres(programs, data, port)
    server.start()
    try:
        yield server
    finally:
        server.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _server(programs: Path, data: Path, port: int) -> list[str]:
    options = ["-h", "127.0.0.1", "-p", str(port), "-k", str(data)]
    return _as_user([str(programs / "postgres"), "-D", str(data), *options])


def _as_user(line: list[str]) -> list[str]:
    return ["runuser", "-u", USER, "--", *line] if os.geteuid() == 0 else line

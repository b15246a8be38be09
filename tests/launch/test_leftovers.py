"""What a launcher that was killed has left: the next start removes what no living process owns, and nothing else."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from stepvideo_serve.launch.leftovers import SHARED_MEMORY, Claim, remove_leftovers
from stepvideo_serve.launch.options import ServerOptions
from stepvideo_serve.launch.server import TritonServer
from tests.launch.test_server import MODEL, READY_S, gone, model_repository

WAIT = "import sys; print('up', flush=True); sys.stdin.read()"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return model_repository(tmp_path, MODEL)


@pytest.fixture
def temporary(tmp_path: Path) -> Path:
    """The folder for temporary files of the launcher that is killed."""
    (tmp_path / "temporary").mkdir()
    return tmp_path / "temporary"


@pytest.fixture
def launcher(repository: Path, temporary: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """With a server that is ready."""
    command = [sys.executable, "-m", "stepvideo_serve", "run", f"--model-repository={repository}"]
    command += [f"--log={temporary.parent / 'log'}", "--", sys.executable, "-c", WAIT]
    env = {**os.environ, "TMPDIR": str(temporary)}
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        try:
            yield process
        finally:
            process.kill()


def left(launcher: "subprocess.Popen[bytes]", temporary: Path) -> tuple[list[Path], list[Path]]:
    """Shared memory and folders."""
    return sorted(SHARED_MEMORY.glob(f"stepvideo_{launcher.pid}_*")), list(temporary.iterdir())


def test_the_next_start_removes_what_nobody_owns_any_more(
    launcher: "subprocess.Popen[bytes]", repository: Path, temporary: Path
) -> None:
    regions, folders = left(launcher, temporary)
    assert len(regions) > 1
    [folder] = folders
    assert all(path.name.startswith(f"{folder.name}_") for path in regions)

    [server] = [child for child in psutil.Process(launcher.pid).children() if child.name() == "tritonserver"]
    processes = [server, *server.children(recursive=True)]
    launcher.send_signal(signal.SIGSTOP)  # it is not to see what comes
    server.kill()  # as the end of a machine's memory ends both
    launcher.kill()
    launcher.wait()
    assert gone(processes)
    assert left(launcher, temporary)[1] == folders
    with TritonServer(ServerOptions(repository, log=temporary.parent / "log", exit_timeout_s=2)) as second:
        assert left(launcher, temporary) == ([], [])
        second.wait_ready(READY_S)
        remove_leftovers()
        assert list(SHARED_MEMORY.glob(f"{second.shm_prefix}*")), "the second one lives"
    assert not list(SHARED_MEMORY.glob(f"{second.shm_prefix}*"))


def test_what_a_living_server_owns_stays(tmp_path: Path) -> None:
    """Its launcher is gone, and the server has the claim open still."""
    folder = tmp_path / "stepvideo_7_02"
    script = "import subprocess, sys; from pathlib import Path; "
    script += "from stepvideo_serve.launch.leftovers import Claim; claim = Claim(sys.argv[2], Path(sys.argv[1])); "
    script += "server = subprocess.Popen(['sleep', '600'], pass_fds=(claim.fd,)); print(server.pid, flush=True)"
    folder.mkdir()
    region = SHARED_MEMORY / f"{folder.name}_region"
    region.write_bytes(b"tensors")
    command = [sys.executable, "-c", script, str(folder), folder.name]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as launcher:
        assert launcher.stdout is not None
        server = psutil.Process(int(launcher.stdout.readline()))
        launcher.wait()
    remove_leftovers()
    assert (folder.exists(), region.exists()) == (True, True)
    server.kill()
    assert gone([server])
    remove_leftovers()
    assert (folder.exists(), region.exists()) == (False, False)
    assert not list(SHARED_MEMORY.glob(f"{folder.name}_*"))


def test_a_launcher_that_is_killed_while_it_starts_leaves_nothing_either(tmp_path: Path) -> None:
    """Killed between its claim and the folder, or before it had a server."""
    script = "import sys; from pathlib import Path; from stepvideo_serve.launch.leftovers import Claim; "
    script += "Claim('stepvideo_7_00', Path(sys.argv[1], 'stepvideo_7_00')); print('up', flush=True); sys.stdin.read()"
    for make_folder in (False, True):
        command = [sys.executable, "-c", script, str(tmp_path)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"up\n"
            if make_folder:
                (tmp_path / "stepvideo_7_00").mkdir()
            remove_leftovers()
            assert list(SHARED_MEMORY.glob("stepvideo_7_00_*"))
            process.send_signal(signal.SIGKILL)
        remove_leftovers()
        assert not list(SHARED_MEMORY.glob("stepvideo_7_00_*"))
        assert not list(tmp_path.iterdir())


def test_a_folder_that_no_launcher_has_made_stays(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    link = tmp_path / "stepvideo_7_01"
    link.symlink_to(precious)
    for folder in (precious, link):
        claim = Claim("stepvideo_7_01", folder)
        os.close(claim.fd)  # as if the launcher were gone
        remove_leftovers()
        assert not list(SHARED_MEMORY.glob("stepvideo_7_01_*"))
        assert sorted(tmp_path.iterdir()) == [precious, link]

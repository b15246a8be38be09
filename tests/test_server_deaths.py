"""A server that dies under a test: that test fails with the log's end, the next has a new server, the death counts."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

# Tests of a session that meets a death; `server` is a session's, `facts` what a module keeps of it.
SESSION = """
import os, signal, urllib.request
import pytest
{imports}

def answers(server):
    with urllib.request.urlopen(f"http://{{server.http_url}}/v2/health/ready", timeout=60) as answer:
        return answer.status == 200

@pytest.fixture(scope="module")
def facts(server):
    yield {{"pid": server.pid}}
    assert answers(server), "needed to the end"

def test_on_a_server(server, facts):
    assert answers(server)

def test_the_death(server, facts):
    os.kill(server.pid, signal.SIGSEGV)
    while answers(server):
        pass

def test_the_next_one(server, facts):
    assert answers(server)
    assert facts["pid"] == server.pid

def test_a_death_that_nobody_noticed(server):
    os.kill(server.pid, signal.SIGSEGV)
    os.waitid(os.P_PID, server.pid, os.WEXITED | os.WNOWAIT)

def test_the_last_one(server, facts):
    assert answers(server)
    assert facts["pid"] == server.pid
"""
UNWATCHED = """
import pytest
from stepvideo_serve.launch.server import TritonServer
from tests.launch.test_server import options

@pytest.fixture(scope="module")
def careless(options):
    with TritonServer(options) as running:
        yield running

def test_on_it(careless):
    pass
"""


def session(root: Path, folder: Path, source: str, *options: str) -> subprocess.CompletedProcess[str]:
    """A pytest of its own on one file, with what tests/conftest.py gives all tests."""
    path = folder / "test_session.py"
    path.write_text(source, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", *options, "-rfE", "--rootdir", str(folder)]
    command += ["-c", os.devnull, "--import-mode=importlib", str(path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(root / name) for name in (".", "client", "kernels"))}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


def check(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 1, done.stdout + done.stderr
    assert "2 failed, 3 passed" in done.stdout, done.stdout
    assert re.search("^FAILED .*::test_the_death", done.stdout, re.MULTILINE)
    assert re.search("^FAILED .*::test_a_death_that_nobody_noticed", done.stdout, re.MULTILINE)
    first, second = re.findall(r"^The server of fixture (\w+) died \(.*\): the end of .*log says\n", done.stdout, re.M)
    assert first == second
    reports = re.split(r"^The server of fixture \w+ died", done.stdout, flags=re.MULTILINE)[1:3]
    assert all("Signal (11) received" in report for report in reports), done.stdout  # the log is appended to
    summary = done.stdout.partition("test servers: 3 started, 2 died")[2]
    assert "::test_the_death (call): The server of fixture" in summary, done.stdout


def test_a_death_fails_its_test_and_no_other(root: Path, tmp_path: Path) -> None:
    check(session(root, tmp_path, SESSION.format(imports="from tests.launch.test_server import options, server")))


@pytest.mark.slow
def test_a_death_of_the_server_of_most_tests(root: Path, tmp_path: Path) -> None:
    check(session(root, tmp_path, SESSION.format(imports=""), "-p", "tests.serving.conftest"))


def test_a_server_that_nobody_watches_is_refused(root: Path, tmp_path: Path) -> None:
    done = session(root, tmp_path, UNWATCHED)
    assert "Fixture careless must hold its server in watch(server)" in done.stdout, done.stdout + done.stderr

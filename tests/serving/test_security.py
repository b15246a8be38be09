"""The calls of operators, the model repository that needs no writing, and what the server is started with."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

from stepvideo_serve.errors import SetupError
from stepvideo_serve.launch.options import GRPC_OPERATOR_HEADER, OPERATOR_HEADER, ServerOptions, ServerSecurity
from stepvideo_serve.launch.server import TritonServer, serve_main
from tests.launch.test_server import MODEL, ask, model_repository
from tests.server_deaths import WatchServer
from tests.serving.calls import Values

KEY = "0123456789abcdef" * 2 + "_-"
READY_S = 60.0

# What an operator may do: the same method of both clients.
OPERATOR_CALLS: dict[str, Callable[[Any, dict[str, str]], object]] = {
    "repository index": lambda client, headers: client.get_model_repository_index(headers=headers),
    "load": lambda client, headers: client.load_model("environment", headers=headers),
    "unload": lambda client, headers: client.unload_model("environment", headers=headers),
    "shared memory": lambda client, headers: client.get_system_shared_memory_status(headers=headers),
    "shared memory registration": lambda client, headers: client.register_system_shared_memory(
        "region", "/region", 64, headers=headers
    ),
    "trace": lambda client, headers: client.get_trace_settings(headers=headers),
    "trace file": lambda client, headers: client.update_trace_settings(
        settings={"trace_file": "/tmp/trace"}, headers=headers
    ),
    "logging": lambda client, headers: client.get_log_settings(headers=headers),
    "log file": lambda client, headers: client.update_log_settings({"log_file": "/tmp/log"}, headers=headers),
}
ALLOWED = ("repository index", "shared memory", "trace", "logging")  # and answered, without changing anything


def started(folder: Path, security: ServerSecurity) -> TritonServer:
    options = ServerOptions(model_repository(folder, MODEL), log=folder / "log", exit_timeout_s=2, security=security)
    return TritonServer(options)


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory, watch: WatchServer) -> Iterator[TritonServer]:
    """A server of a trivial model whose operators have KEY."""
    folder = tmp_path_factory.mktemp("keyed")
    (folder / "key").write_text(KEY + "\n", encoding="ascii")
    with started(folder, ServerSecurity(operator_key=folder / "key")) as server, watch(server):
        server.wait_ready(READY_S)
        yield server


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory, watch: WatchServer) -> Iterator[TritonServer]:
    """A server as it is by default: nobody is its operator."""
    with started(tmp_path_factory.mktemp("closed"), ServerSecurity()) as server, watch(server):
        server.wait_ready(READY_S)
        yield server


def ask_both(server: TritonServer, call: str, key: str | None) -> list[str | None]:
    """What the call over gRPC and over HTTP was refused with; None for an answer."""
    refusals: list[str | None] = []
    for client, header in (
        (tritonclient.grpc.InferenceServerClient(server.grpc_url), GRPC_OPERATOR_HEADER),
        (tritonclient.http.InferenceServerClient(server.http_url), OPERATOR_HEADER),
    ):
        with client:
            try:
                OPERATOR_CALLS[call](client, {} if key is None else {header: key})
                refusals.append(None)
            except InferenceServerException as error:
                refusals.append(error.message())
    return refusals


@pytest.mark.parametrize("call", OPERATOR_CALLS)
@pytest.mark.parametrize("key", [None, "", "wrong" * 8, KEY[:-1], KEY + "x"])
def test_refused_without_the_key(keyed: TritonServer, call: str, key: str | None) -> None:
    for refusal in ask_both(keyed, call, key):
        assert refusal is not None
        assert "This protocol is restricted, expecting header" in refusal or "This API is restricted" in refusal


@pytest.mark.parametrize("call", ALLOWED)
def test_answered_with_the_key(keyed: TritonServer, call: str) -> None:
    assert ask_both(keyed, call, KEY) == [None, None]


@pytest.mark.parametrize("call", ["load", "unload"])
def test_even_an_operator_does_not_change_the_models(keyed: TritonServer, call: str) -> None:
    for refusal in ask_both(keyed, call, KEY):
        assert refusal is not None
        assert "not allowed" in refusal


@pytest.mark.parametrize("call", OPERATOR_CALLS)
def test_without_a_key_file_there_are_no_operators(closed: TritonServer, call: str) -> None:
    assert None not in ask_both(closed, call, None)
    assert None not in ask_both(closed, call, KEY)


def test_others_are_served(closed: TritonServer) -> None:
    assert ask(closed.grpc_url, "prefix") == sys.prefix


def test_the_key_is_not_logged(keyed: TritonServer) -> None:
    log = keyed.options.log
    assert log is not None
    assert KEY not in log.read_text()
    assert KEY not in repr(keyed.options)


@pytest.mark.parametrize("text", ["", "tooshort1", "x" * 257, "a" * 40 + ":b=c", "a b" * 20, "schlüssel" * 5])
def test_keys_that_are_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "key"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SetupError, match=r"The operator key must be (32 to 256 letters|readable)") as refusal:
        ServerSecurity(operator_key=path)
    assert len(text) < 5 or text not in str(refusal.value), "the key itself is not told"


def test_a_wrong_option_is_one_sentence(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", str(root / "serve.toml"), "--operator-key", str(tmp_path / "none")]
    assert serve_main(arguments) == 1
    assert capsys.readouterr().err.count("\n") == 1


def without_right_to_override() -> list[str]:
    """Root may write where the mode forbids it; this takes that right away, as the container's user never has it."""
    if os.geteuid() != 0:
        return []
    return ["setpriv", "--bounding-set", "-dac_override,-dac_read_search", "--inh-caps", "-all"]


def test_serves_from_a_read_only_model_repository(root: Path, tmp_path: Path, config_text: str, small: Values) -> None:
    """The real models generate a video, and what they are loaded from can be written by nobody."""
    repository = tmp_path / "read-only" / "model_repository"
    shutil.copytree(root / "model_repository", repository, ignore=shutil.ignore_patterns("__pycache__"))
    config, image, video = repository.parent / "serve.toml", tmp_path / "image.png", tmp_path / "video.mp4"
    config.write_text(config_text, encoding="utf-8")
    assert isinstance(small["IMAGE"], bytes)
    image.write_bytes(small["IMAGE"])
    files = sorted(repository.rglob("*"))
    for path in [repository.parent, *repository.parent.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    size = "--num-frames 17 --height 64 --width 96 --infer-steps 2"
    script = (
        f'if touch "{repository}/ti2v/1/written"; then exit 99; fi; '
        f'exec "{sys.executable}" -m stepvideo_client generate --url "$STEPVIDEO_GRPC_URL" --quiet {size} '
        f'--image "{image}" --prompt "a cat" --out "{video}"'
    )
    try:
        done = subprocess.run(
            [
                *without_right_to_override(),
                *(sys.executable, "-m", "stepvideo_serve", "run"),
                *("--model-repository", str(repository), "--config", str(config), "--log", str(tmp_path / "log")),
                *("--", "sh", "-c", script),
            ],
            cwd=root,
            env={**os.environ, "PYTHONPATH": f"{root}:{root / 'client'}"},
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        for path in [repository.parent, *(path for path in repository.parent.rglob("*") if path.is_dir())]:
            path.chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert video.read_bytes()[4:8] == b"ftyp"
    assert sorted(repository.rglob("*")) == files

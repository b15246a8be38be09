"""The launcher, with the real server: what it starts, and that it leaves nothing behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from tritonclient import grpc

from stepvideo_serve.errors import SetupError
from stepvideo_serve.launch.install import link_stub
from stepvideo_serve.launch.leftovers import SHARED_MEMORY
from stepvideo_serve.launch.options import ServerOptions
from stepvideo_serve.launch.server import TritonServer, run_main
from tests import signals
from tests.server_deaths import WatchServer

READY_S = 60.0
GONE_S = 30.0

CONFIG = """
name: "environment"
backend: "python"
max_batch_size: 0
input [ { name: "NAME" data_type: TYPE_STRING dims: [ 1 ] } ]
output [ { name: "VALUE" data_type: TYPE_STRING dims: [ 1 ] } ]
instance_group [ { count: 1 kind: KIND_CPU } ]
"""
# Answers with what its process sees.
MODEL = """
import os, sys
import numpy as np
import triton_python_backend_utils as pb_utils
import stepvideo_serve

class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            name = pb_utils.get_input_tensor_by_name(request, "NAME").as_numpy()[0].decode()
            facts = {"package": stepvideo_serve.__file__, "prefix": sys.prefix, "pid": str(os.getpid())}
            value = facts.get(name) or os.environ.get(name, "")
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("VALUE", np.array([value.encode()], object))]))
        return responses
"""
BROKEN_MODEL = """
class TritonPythonModel:
    def initialize(self, args):
        raise ValueError("no weights today")
"""


def model_repository(folder: Path, source: str) -> Path:
    version = folder / "models" / "environment" / "1"
    version.mkdir(parents=True)
    (version / "model.py").write_text(source, encoding="utf-8")
    (version.parent / "config.pbtxt").write_text(CONFIG, encoding="utf-8")
    return folder / "models"


def ask(url: str, name: str) -> str:
    given = grpc.InferInput("NAME", [1], "BYTES")
    given.set_data_from_numpy(np.array([name.encode()], object))
    with grpc.InferenceServerClient(url) as client:
        value = client.infer("environment", [given]).as_numpy("VALUE")
    return bytes(value[0]).decode()


def regions(server: TritonServer) -> list[Path]:
    return list(SHARED_MEMORY.glob(f"{server.shm_prefix}*"))


def members(server: TritonServer) -> list[psutil.Process]:
    return [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]


def gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=GONE_S)[1]


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> ServerOptions:
    folder = tmp_path_factory.mktemp("tritonserver")
    config = folder / "serve.toml"
    config.write_text("", encoding="utf-8")
    return ServerOptions(model_repository(folder, MODEL), config=config, log=folder / "server.log", exit_timeout_s=2)


@pytest.fixture(scope="module")
def server(options: ServerOptions, watch: WatchServer) -> Iterator[TritonServer]:
    with TritonServer(options) as running, watch(running):
        running.wait_ready(READY_S)
        yield running


def test_models_see_this_package_this_environment_and_the_configuration(
    server: TritonServer, options: ServerOptions, root: Path
) -> None:
    assert Path(ask(server.grpc_url, "package")) == root / "stepvideo_serve" / "__init__.py"
    assert ask(server.grpc_url, "prefix") == sys.prefix
    assert ask(server.grpc_url, "STEPVIDEO_CONFIG") == str(options.config)


def test_models_do_not_see_the_folder_that_the_server_was_started_from(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "numpy.py").write_text("raise ImportError('not this one')\n", encoding="utf-8")
    repository = model_repository(tmp_path, MODEL)
    monkeypatch.chdir(tmp_path)
    options = ServerOptions(repository.relative_to(tmp_path), log=Path("server.log"), exit_timeout_s=2)
    with TritonServer(options) as started:
        started.wait_ready(READY_S)
        assert Path(ask(started.grpc_url, "package")) == root / "stepvideo_serve" / "__init__.py"


def test_http_and_metrics_answer_where_the_addresses_say(server: TritonServer) -> None:
    with urllib.request.urlopen(f"http://{server.http_url}/v2/models/environment") as answer:
        assert json.load(answer)["name"] == "environment"
    with urllib.request.urlopen(server.metrics_url) as answer:
        assert b"nv_inference_request_success" in answer.read()


def test_listens_on_loopback_only(server: TritonServer) -> None:
    open_sockets = psutil.Process(server.pid).net_connections()
    listening = {entry.laddr for entry in open_sockets if entry.status == psutil.CONN_LISTEN}
    assert len(listening) == 3
    assert {address.ip.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}


def test_a_port_in_use_is_named_before_anything_starts(options: ServerOptions, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        log = tmp_path / "server.log"
        second = TritonServer(ServerOptions(options.model_repository, http_port=port, log=log))
        with pytest.raises(SetupError, match=rf"The HTTP port must be free, but 127\.0\.0\.1:{port} .*--http-port"):
            second.start()
        assert not log.exists()


def test_one_port_for_two_services_is_refused(options: ServerOptions) -> None:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    with pytest.raises(SetupError, match=f"HTTP port must be free, but 127.0.0.1:{port}"):
        TritonServer(ServerOptions(options.model_repository, grpc_port=port, http_port=port)).start()


def test_a_missing_configuration_is_refused(options: ServerOptions, tmp_path: Path) -> None:
    missing = tmp_path / "serve.toml"
    with pytest.raises(SetupError, match=f"nothing at {missing}"):
        TritonServer(ServerOptions(options.model_repository, config=missing)).start()


def test_a_place_that_tritons_python_cannot_name_is_refused_before_anything_starts(tmp_path: Path) -> None:
    elsewhere = TritonServer(ServerOptions(model_repository(tmp_path / "模型", MODEL), log=tmp_path / "log"))
    with pytest.raises(SetupError, match=r"model repository must be at a path of ASCII characters.*模型"):
        elsewhere.start()
    assert not (tmp_path / "log").exists()


def test_a_server_that_was_not_started_has_no_pid(options: ServerOptions) -> None:
    with pytest.raises(SetupError, match="call start"):
        TritonServer(options).pid  # noqa: B018


def test_a_model_that_cannot_start_fails_at_once_with_the_log(tmp_path: Path) -> None:
    broken = TritonServer(ServerOptions(model_repository(tmp_path, BROKEN_MODEL), log=tmp_path / "server.log"))
    with (
        broken,
        pytest.raises(SetupError, match=r"environment must load, but ValueError: no weights today: "),
    ):
        broken.wait_ready(READY_S)
    assert not regions(broken)


def test_stop_leaves_no_process_and_no_shared_memory(options: ServerOptions) -> None:
    with TritonServer(options) as running:
        running.wait_ready(READY_S)
        ask(running.grpc_url, "pid")
        processes = members(running)
        assert len(processes) > 1
        assert regions(running)
    assert gone(processes)
    assert not regions(running)
    running.stop()  # a second time is harmless


def test_a_crashed_server_leaves_no_process_and_no_shared_memory(options: ServerOptions) -> None:
    with TritonServer(options) as running:
        running.wait_ready(READY_S)
        processes = members(running)
        os.kill(running.pid, signal.SIGKILL)
        assert running.wait() == -signal.SIGKILL
    assert gone(processes)
    assert not regions(running)


def test_a_dead_stub_does_not_keep_the_server_alive(options: ServerOptions) -> None:
    with TritonServer(options) as running:
        running.wait_ready(READY_S)
        processes = members(running)
        os.kill(int(ask(running.grpc_url, "pid")), signal.SIGKILL)
    assert gone(processes)
    assert not regions(running)


def launch(options: ServerOptions, *arguments: str) -> list[str]:
    name, *others = arguments
    return [
        *(sys.executable, "-m", "stepvideo_serve", name),
        *(f"--model-repository={options.model_repository}", f"--config={options.config}", f"--log={options.log}"),
        *others,
    ]


def test_serve_runs_until_ctrl_c(options: ServerOptions) -> None:
    command = launch(options, "serve", "--grpc-port=0", "--http-port=0", "--metrics-port=0")
    with signals.start(command, stdout=subprocess.PIPE) as launcher:
        assert launcher.stdout is not None
        assert "ready: gRPC 127.0.0.1:" in launcher.stdout.readline()
        processes = psutil.Process(launcher.pid).children(recursive=True)
        signals.interrupt(launcher)
        try:
            assert launcher.wait(READY_S) == 0
        finally:
            launcher.kill()
    assert gone(processes)


def test_run_gives_the_command_the_addresses_and_returns_its_code(options: ServerOptions) -> None:
    script = "import os, sys; print(os.environ['STEPVIDEO_GRPC_URL'], os.environ['STEPVIDEO_HTTP_URL']); sys.exit(7)"
    done = subprocess.run(
        launch(options, "run", "--", sys.executable, "-c", script), capture_output=True, text=True, check=False
    )
    assert done.returncode == 7, done.stderr
    ports = [int(url.removeprefix("127.0.0.1:")) for url in done.stdout.split()]
    assert len(set(ports)) == 2


def test_run_keeps_proxies_from_the_way_to_the_server(options: ServerOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "example.org")
    script = (
        "import os, urllib.request as u; u.urlopen('http://' + os.environ['STEPVIDEO_HTTP_URL'] + '/v2/health/live')"
    )
    done = subprocess.run(
        launch(options, "run", "--", sys.executable, "-c", script), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_run_reports_what_it_could_not_start_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main([f"--model-repository={tmp_path / 'none'}", "--", "true"]) == 1
    assert capsys.readouterr().err.startswith("error: The model repository must exist")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_ended_launcher_leaves_no_server(options: ServerOptions, number: signal.Signals) -> None:
    script = "import sys; print('up', flush=True); sys.stdin.read()"
    command = launch(options, "run", "--", sys.executable, "-c", script)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == b"up\n"
        processes = psutil.Process(launcher.pid).children(recursive=True)
        assert any(process.name() == "tritonserver" for process in processes)
        launcher.send_signal(number)
    assert launcher.returncode == (128 + number if number == signal.SIGTERM else -number)
    assert gone(processes)


def test_a_python_without_a_stub_is_told_which_have_one(tmp_path: Path) -> None:
    (tmp_path / "python_backend_stubs" / "2.7").mkdir(parents=True)
    with pytest.raises(SetupError, match=r"a stub for Python 3\.\d+, but has 2\.7"):
        link_stub(tmp_path)


def test_the_launcher_does_not_load_torch() -> None:
    script = "import sys, stepvideo_serve.launch.server; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0

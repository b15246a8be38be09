"""The supervisor with the real server: processes that are killed or stopped, and what is left when all is over."""

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from stepvideo_client import Client, Result, StepEvent, StreamStalled
from stepvideo_serve.launch.health import check
from stepvideo_serve.launch.leftovers import SHARED_MEMORY
from stepvideo_serve.launch.supervise import Recent
from tests.parallel.failing import SIGNALS
from tests.serving.calls import Outputs, Refused, Server, Stream, Values, grpc_request

PATIENCE_S = 600.0  # models are loaded anew, on a machine that may be busy
IDLE_S = 20.0  # longer than the 15 s after which the server repeats itself
GPU_MODELS = ("text_encoder", "vae_encoder", "vae_decoder")
STUB = "triton_python_backend_stub"
# dit_denoiser of these tests: one of its threads dies when the file is there that TRIGGER names.
MODEL = "from tests.serving.fault_site.planted_denoiser import PlantedDenoiser as TritonPythonModel\n"
TRIGGER = "STEPVIDEO_TEST_TRIGGER"
READY = re.compile(r"ready: gRPC (\S+), HTTP (\S+), ")

pytestmark = pytest.mark.slow


@dataclass
class Supervised:
    """A supervisor, its server, and what it has said so far."""

    process: subprocess.Popen[str]
    folder: Path
    said: list[str] = field(default_factory=list)
    grpc_url: str = ""
    http_url: str = ""
    answer: Outputs = field(default_factory=dict)

    @property
    def server(self) -> Server:
        """The server that runs now."""
        [pid] = [child.pid for child in psutil.Process(self.process.pid).children() if child.name() == "tritonserver"]
        return Server(self.grpc_url, self.http_url, pid)

    def stub(self, model: str) -> psutil.Process:
        return self.server.process(f"/{model}/")

    def wait_for(self, words: str, since: int = 0) -> None:
        """Until the supervisor has said so."""
        self.until(lambda: any(words in line for line in self.said[since:]), words)

    def until(self, condition: Callable[[], bool], what: str) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while not condition():
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline_s, f"{what}: {self.said}"
            time.sleep(0.1)

    def well(self) -> bool:
        return check(self.http_url, "ready", 30.0).well


def repository_with_faults(root: Path, folder: Path) -> Path:
    """The model repository, where signals cost models their GPUs, and `dit_denoiser` may lose a thread."""
    copy = shutil.copytree(root / "model_repository", folder / "repository")
    for model in GPU_MODELS:
        file = copy / model / "1" / "model.py"
        faults = "from tests.parallel.failing import fail_at_signals\n\nfail_at_signals()\n"
        file.write_text(file.read_text(encoding="utf-8") + faults, encoding="utf-8")
    (copy / "dit_denoiser" / "1" / "model.py").write_text(MODEL, encoding="utf-8")
    return copy


@pytest.fixture(scope="module")
def supervised(
    root: Path, config_text: str, small: Values, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Supervised]:
    folder = tmp_path_factory.mktemp("supervised")
    config = folder / "serve.toml"
    config.write_text(config_text, encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "stepvideo_serve",
        "supervise",
        f"--config={config}",
        f"--log={folder / 'log'}",
    ]
    command += ["--grpc-port=0", "--http-port=0", "--metrics-port=0", "--exit-timeout=2", "--check-every=5"]
    command += [f"--ready-timeout={PATIENCE_S}", f"--model-repository={repository_with_faults(root, folder)}"]
    env = {**os.environ, TRIGGER: str(folder / "trigger")}
    with subprocess.Popen(
        command, cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        run = Supervised(process, folder)
        assert process.stderr is not None
        assert process.stdout is not None
        stderr = process.stderr
        reader = threading.Thread(target=lambda: run.said.extend(stderr))
        reader.start()
        try:
            ready = READY.match(process.stdout.readline())
            assert ready is not None, run.said
            run.grpc_url, run.http_url = ready.groups()
            run.answer = run.server.stream_result(small)
            yield run
        finally:
            process.kill()
            reader.join()


def assert_right(supervised: Supervised, small: Values) -> None:
    """The same request has the same answer as before anything happened."""
    supervised.until(supervised.well, "the server to be well")
    np.testing.assert_array_equal(supervised.server.stream_result(small)["LATENTS"], supervised.answer["LATENTS"])


def test_a_public_models_process_that_is_killed_is_replaced(supervised: Supervised, small: Values) -> None:
    since, old = len(supervised.said), supervised.stub("ti2v")
    old.kill()
    supervised.wait_for("ti2v is loaded anew: its process", since)
    supervised.wait_for("ti2v answers again", since)
    assert supervised.stub("ti2v").pid != old.pid
    assert_right(supervised, small)


def test_a_client_hears_silence_from_a_process_that_died(supervised: Supervised, small: Values, picture: bytes) -> None:
    since = len(supervised.said)
    with Client(supervised.grpc_url, idle_timeout_s=IDLE_S) as client:
        events = client.generate(picture, "a cat", num_frames=17, height=64, width=96, steps=90_000, output="latents")
        step = next(event for event in events if isinstance(event, StepEvent) and event.step > 0)
        assert step.total_steps == 90_000
        supervised.stub("ti2v").kill()
        with pytest.raises(StreamStalled, match=r"for 20 s after step \d+ of 90000, not even a sign of life"):
            list(events)
    supervised.wait_for("ti2v answers again", since)
    with Client(supervised.grpc_url, idle_timeout_s=120.0) as client:
        [*_, last] = client.generate(picture, "a cat", num_frames=17, height=64, width=96, steps=2, output="latents")
    assert isinstance(last, Result)
    assert_right(supervised, small)


def test_a_request_whose_denoiser_is_killed_ends_with_an_error_and_the_next_one_is_right(
    supervised: Supervised, long: Values, small: Values
) -> None:
    since, rank = len(supervised.said), supervised.server.rank()
    with Stream(supervised.grpc_url, grpc_request("ti2v", long)) as stream:
        stream.wait_for_step(1)
        supervised.stub("dit_denoiser").kill()
        with pytest.raises(Refused, match=r"INTERNAL: The process of dit_denoiser was lost during the request"):
            stream.wait_for_step(100_000)
    supervised.wait_for("dit_denoiser answers again", since)
    assert_right(supervised, small)
    assert not rank.is_running()


def test_a_process_that_stays_stopped_is_replaced(supervised: Supervised, small: Values) -> None:
    since, old = len(supervised.said), supervised.stub("vae_encoder")
    old.send_signal(signal.SIGSTOP)
    supervised.wait_for("vae_encoder answers again", since)
    assert supervised.stub("vae_encoder").pid != old.pid  # the supervisor saw it stand, or the server gave it up first
    assert_right(supervised, small)


@pytest.mark.parametrize("model", GPU_MODELS)
def test_a_model_that_loses_its_gpu_answers_ends_and_is_replaced(
    supervised: Supervised, small: Values, model: str
) -> None:
    since, old = len(supervised.said), supervised.stub(model)
    old.send_signal(SIGNALS["CUDA error"])
    unseen = io.BytesIO()  # so that no stage has kept what it would make of the request
    Image.new("RGB", (64, 64), tuple(uuid.uuid4().bytes[:3])).save(unseen, "PNG")
    words = {"PROMPT": uuid.uuid4().hex.encode(), "IMAGE": unseen.getvalue(), "OUTPUT": b"frames"}
    other: Values = {**small, **words, "SEED": np.array([8], np.int64)}
    with pytest.raises(Refused, match=r"INTERNAL: This process has lost its GPU .*illegal memory access"):
        supervised.server.stream(other)
    supervised.wait_for(f"{model} is loaded anew: its process {old.pid} has died", since)
    supervised.wait_for(f"{model} answers again", since)
    assert_right(supervised, small)
    supervised.server.stream(other)


@pytest.mark.parametrize("model", ["text_encoder", "vae_decoder"])
def test_a_model_that_has_lost_its_gpu_is_found_by_its_probe(supervised: Supervised, small: Values, model: str) -> None:
    since, old = len(supervised.said), supervised.stub(model)
    old.send_signal(SIGNALS["TensorRT refuses"])
    supervised.wait_for(f"{model} is loaded anew: its process {old.pid} has died", since)
    supervised.wait_for(f"{model} answers again", since)
    assert_right(supervised, small)


def test_a_model_that_has_lost_a_thread_is_loaded_anew(supervised: Supervised, small: Values) -> None:
    """Its process lives and answers requests all the while."""
    since, old = len(supervised.said), supervised.stub("dit_denoiser")
    (supervised.folder / "trigger").touch()
    supervised.until(lambda: not check(supervised.http_url, "live", 30.0).well, "a probe to be refused")
    health = check(supervised.http_url, "ready", 30.0)
    assert not health.well
    supervised.wait_for("dit_denoiser is loaded anew: it has lost a thread", since)
    supervised.wait_for("dit_denoiser answers again", since)
    assert supervised.stub("dit_denoiser").pid != old.pid
    log = (supervised.folder / "log").read_text(encoding="utf-8", errors="replace")
    assert "dit_denoiser: thread_died: rank-watch" in log
    assert "OverflowError: planted" in log
    assert_right(supervised, small)


def test_a_server_that_is_killed_is_started_anew_on_its_ports(
    supervised: Supervised, long: Values, small: Values
) -> None:
    since, old = len(supervised.said), supervised.server.pid
    processes = psutil.Process(old).children(recursive=True)
    with supervised.server.open(long) as stream:
        stream.wait_for_step(1)
        os.kill(old, signal.SIGKILL)
        assert not psutil.wait_procs(processes, timeout=10.0)[1], "models and ranks end with it, busy or not"
    supervised.wait_for("the server is started anew in 1 s: it has exited with code -9", since)
    supervised.wait_for("the server is ready again", since)
    assert supervised.server.pid != old
    assert_right(supervised, small)


def test_a_supervisor_that_is_told_to_end_leaves_nothing(supervised: Supervised) -> None:
    processes = psutil.Process(supervised.process.pid).children(recursive=True)
    assert any(process.name() == STUB for process in processes) or len(processes) > 5
    supervised.process.send_signal(signal.SIGTERM)
    assert supervised.process.wait(PATIENCE_S) == 128 + signal.SIGTERM
    assert not psutil.wait_procs(processes, timeout=60.0)[1]
    assert not list(SHARED_MEMORY.glob(f"stepvideo_{supervised.process.pid}_*"))


def test_what_happens_too_often_is_not_allowed_until_it_is_long_ago() -> None:
    recent = Recent(2, 0.05)
    assert [recent.allow(), recent.allow(), recent.allow()] == [True, True, False]
    time.sleep(0.06)
    assert recent.allow()

"""Quotes: by the ledger's arithmetic, without a server, and from the real one."""

import itertools
import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepvideo_client import Client, ServiceUnavailable
from stepvideo_client import InvalidRequest as RefusedByServer
from stepvideo_serve.config import ModelConfig, ServeConfig
from stepvideo_serve.errors import InvalidRequest
from stepvideo_serve.errors import ServiceUnavailable as Unmeasured
from stepvideo_serve.geometry import VideoGeometry
from stepvideo_serve.memory.placement import Placement
from stepvideo_serve.memory.predicted import ENGINES, TORCH, predicted
from stepvideo_serve.parallel.layout import Layout
from stepvideo_serve.planning.evaluations import EvaluationCounts
from stepvideo_serve.planning.model_size import PUBLISHED, model_size, workload
from stepvideo_serve.planning.pace import Ledger, step_flops
from stepvideo_serve.planning.quote import PARTS, QuoteRequest, Server, quote
from stepvideo_serve.request.presets import Preset
from stepvideo_serve.scheduling.progress import Repeated
from stepvideo_serve.scheduling.run_queue import QueuedRun, QueueRules, RunQueue, RunTerms
from tests.server_deaths import WatchServer
from tests.serving.calls import Refused, Values, report_of
from tests.serving.calls import Server as Running
from tests.serving.launch import serving

STAGES = [stage for stages in PARTS.values() for stage in stages]
CHANNELS = 8
CONFIG = ServeConfig(ModelConfig(Path("model"), Path("engines")))

LONGEST_STEP_S = 30.0  # far more than a step of these sizes takes on a busy machine


@pytest.fixture(scope="module")
def published() -> Server:
    return Server(model_size(PUBLISHED), PUBLISHED, Placement(Layout()), "bf16", "cuda", ENGINES)


def asked(**numbers: int | float | bytes) -> QuoteRequest:
    arrays: dict[str, Any] = {}
    for name, value in numbers.items():
        kind: Any = np.object_ if isinstance(value, bytes) else np.float32 if isinstance(value, float) else np.int32
        arrays[name] = np.array([value], kind)
    return QuoteRequest.parse(arrays, CONFIG, CHANNELS)


def measured(work: float = 1e9, seconds: float = 2.0) -> dict[str, Any]:
    """The state of a server on which every stage did so much work in so long."""
    ledger = Ledger()
    for stage in STAGES:
        ledger.note(stage, work, seconds)
    return {"rates": ledger.points(), "wait_s": 12.5, "waiting": 3, "evaluations": []}


def test_a_quote_is_what_the_ledger_says(published: Server) -> None:
    """At one size everything is in proportion to its work."""
    request = asked(NUM_FRAMES=34, HEIGHT=128, WIDTH=192, STEPS=7, PROMPT_TOKENS=100, NEGATIVE_TOKENS=60)
    report = quote(request, published, measured())
    pixels, rate = 128 * 192, 2.0 / 1e9
    flops = step_flops(PUBLISHED.dit, 6 * 8 * 12, [77 + 100, 77 + 60])
    expected = {
        "text": 160 * rate,
        "vae_encode": 2 * pixels * rate,
        "denoise": (6 * 8 * 12 + 7 * flops) * rate,
        "vae_decode": 34 * pixels * rate,
        "mp4": 2 * 34 * pixels * rate,
    }
    assert report["seconds"] == pytest.approx({"total": sum(expected.values()), **expected})
    on_gpu = {part: seconds for part, seconds in expected.items() if part != "mp4"}
    assert report["gpu_seconds"] == pytest.approx({"total": sum(on_gpu.values()), **on_gpu})
    assert (report["queue_wait_s"], report["waiting"]) == (12.5, 3)
    assert report["step_seconds"] == pytest.approx(flops * rate)
    assert json.loads(json.dumps(report)) == report


def test_a_quote_survives_the_way_as_json(published: Server) -> None:
    ledger = Ledger()
    for stage, (work, seconds) in itertools.product(STAGES, [(1e3, 0.3), (1e6, 0.9), (3e6, 0.7), (1e9, 5.1)]):
        ledger.note(stage, work, seconds)
    state = {"rates": ledger.points(), "wait_s": 0.0, "waiting": 0, "evaluations": []}
    report = quote(asked(), published, json.loads(json.dumps(state)))
    assert report["seconds"]["text"] == ledger.seconds("text", 320)


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"STEPS": 10}, {"STEPS": 11}),
        ({"NUM_FRAMES": 34}, {"NUM_FRAMES": 51}),
        ({"HEIGHT": 128}, {"HEIGHT": 144}),
        ({"WIDTH": 128}, {"WIDTH": 144}),
        ({"CFG_SCALE": 1.0}, {"CFG_SCALE": 1.5}),
        ({"OUTPUT": b"latents"}, {"OUTPUT": b"frames"}),
        ({"OUTPUT": b"frames"}, {"OUTPUT": b"mp4"}),
        ({"PROMPT_TOKENS": 50}, {"PROMPT_TOKENS": 51}),
        ({"PROMPT_TOKENS": 320}, {"PROMPT_TOKENS": 320, "NEGATIVE_TOKENS": 320}),
    ],
)
def test_more_work_costs_more(published: Server, less: dict[str, Any], more: dict[str, Any]) -> None:
    cheap, dear = (quote(asked(**case), published, measured()) for case in (less, more))
    assert cheap["seconds"]["total"] < dear["seconds"]["total"]
    assert cheap["gpu_seconds"]["total"] <= dear["gpu_seconds"]["total"]
    assert cheap["peak_memory_mib"] <= dear["peak_memory_mib"]


def test_memory_is_the_ledgers(published: Server) -> None:
    """Of the fullest GPU."""
    geometry = VideoGeometry(102, 544, 992)
    work = workload(PUBLISHED, geometry, 50)
    place = Placement(Layout.parse("cfg2.tp4"), llm_on_ranks=True)
    server = replace(published, placement=place, precision="fp8")
    planned = predicted(published.size, place, work, "fp8").by_gpu
    assert server.peak_memory_bytes(geometry, 2) == planned[0] == max(planned.values())
    whole = predicted(published.size, published.placement, work, "bf16").by_gpu[0]
    assert published.peak_memory_bytes(geometry, 2) == whole
    in_torch = replace(published, runs=TORCH)
    assert in_torch.peak_memory_bytes(geometry, 2) > whole
    cpu = replace(published, device="cpu")
    assert cpu.peak_memory_bytes(geometry, 2) < whole
    assert replace(cpu, precision="fp32").peak_memory_bytes(geometry, 2) > 1.9 * cpu.peak_memory_bytes(geometry, 2)


def test_ranks_multiply_gpu_seconds_and_divide_decoding(published: Server) -> None:
    one = quote(asked(NUM_FRAMES=102), published, measured())
    four = quote(asked(NUM_FRAMES=102), replace(published, placement=Placement(Layout.parse("tp4"))), measured())
    assert four["seconds"]["vae_decode"] == pytest.approx(one["seconds"]["vae_decode"] * 2 / 6)
    assert four["gpu_seconds"]["denoise"] == pytest.approx(4 * one["gpu_seconds"]["denoise"])
    assert four["gpu_seconds"]["text"] == one["gpu_seconds"]["text"]


def test_what_was_not_measured_is_named(published: Server) -> None:
    state = measured()
    del state["rates"]["vae_decode"], state["rates"]["mp4"]
    with pytest.raises(
        Unmeasured, match=r"vae_decode, mp4 has not run yet .* with OUTPUT mp4, QUALITY exact and a new prompt"
    ):
        quote(asked(), published, state)
    assert quote(asked(OUTPUT=b"latents"), published, state)["seconds"]["vae_decode"] == 0.0


def test_a_mask_is_quoted_exactly(published: Server) -> None:
    mask = "11" + "0" * 47 + "1"
    qualities = (b"exact", f"mask:{mask}".encode())
    exact, masked = (quote(asked(STEPS=50, QUALITY=quality), published, measured()) for quality in qualities)
    saved = 47 * (exact["step_seconds"] - masked["forecast_seconds"])
    assert masked["forecast_seconds"] > 0
    assert exact["seconds"]["total"] - masked["seconds"]["total"] == pytest.approx(saved)
    assert masked["seconds_range"] == pytest.approx([masked["seconds"]["total"]] * 2)
    assert masked["evaluations"]["mean"] == 3


def test_an_adaptive_preset_is_quoted_by_its_runs_with_their_range(published: Server) -> None:
    request = asked(STEPS=50, QUALITY=b"fast")
    with pytest.raises(Unmeasured, match="needs a finished run of QUALITY fast, and there was none yet"):
        quote(request, published, measured())
    counts = EvaluationCounts()
    tokens = request.request.geometry.tokens
    for evaluations in (12, 20):
        counts.note(request.preset, 50, tokens, evaluations, evaluations)
    report = quote(request, published, {**measured(), "evaluations": json.loads(json.dumps(counts.points()))})
    assert report["evaluations"] == {"mean": 16, "least": 12, "most": 20, "guided_share": 1, "runs": 2, "alike": True}
    step_s = report["step_seconds"] - report["forecast_seconds"]
    low, high = report["seconds_range"]
    assert high - low == pytest.approx(8 * step_s)
    assert (low + high) / 2 == pytest.approx(report["seconds"]["total"])


def test_cfg2_gains_nothing_by_a_skipped_branch(published: Server) -> None:
    late = Preset("exact", guidance_from=0.1)
    request = replace(asked(STEPS=50), preset=late)
    one, two = (
        quote(request, replace(published, placement=Placement(Layout.parse(name))), measured())
        for name in ("single", "cfg2")
    )
    assert 0 < one["evaluations"]["guided_share"] < 1
    assert one["seconds"]["denoise"] < two["seconds"]["denoise"]
    assert one["notes"] == []
    [note] = two["notes"]
    assert "a step without guidance costs it as much as one with" in note


BAD = {
    "quality": ({"STEPS": 50, "QUALITY": b"quick"}, "QUALITY must be one of exact, balanced, fast, or mask:"),
    "frames": ({"NUM_FRAMES": 16}, "NUM_FRAMES must be a positive multiple of 17"),
    "steps": ({"STEPS": 0}, "STEPS must be from 1 to"),
    "scale": ({"CFG_SCALE": float("nan")}, "CFG_SCALE must be a finite number"),
    "priority": ({"REQUEST_PRIORITY": 4}, "REQUEST_PRIORITY must be from 1 to 3"),
    "output": ({"OUTPUT": b"gif"}, "OUTPUT must be one of mp4"),
    "tokens": ({"PROMPT_TOKENS": 321}, "PROMPT_TOKENS must be from 2 to 320, got"),
    "no tokens": ({"NEGATIVE_TOKENS": 0}, "NEGATIVE_TOKENS must be from 2 to 320, got"),
    "size": ({"HEIGHT": 1088, "WIDTH": 1920, "NUM_FRAMES": 204}, "at most 75888 tokens"),
    "other": ({"SEED": 1}, "Inputs must be among NUM_FRAMES, .*, NEGATIVE_TOKENS, got 'SEED'"),
}


@pytest.mark.parametrize(("numbers", "words"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused(numbers: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        asked(**numbers)


class Heard:
    """The answer of a run that nobody waits for."""

    def send(self, outputs: Any) -> None: ...
    def waiting(self, waiting: Any) -> None: ...
    def fail(self, error: BaseException) -> None: ...
    def close(self) -> None: ...


def test_a_forecast_counts_what_goes_first() -> None:
    release = threading.Event()
    queue = RunQueue(QueueRules(5), lambda _: release.wait(60), lambda: None, lambda _: 10.0)
    try:
        assert queue.forecast(2) == (0, 0)
        for index, priority in enumerate((2, 2, 3)):
            queue.put(QueuedRun(str(index), RunTerms(Repeated("denoise", {}), priority), Heard()))
        deadline_s = time.monotonic() + 60
        while queue.forecast(2)[0] != 2 and time.monotonic() < deadline_s:
            time.sleep(0.01)
        assert [queue.forecast(priority) for priority in (1, 2, 3)] == [(2, 10.0), (2, 20.0), (2, 30.0)]
        assert [queue.renew(name) for name in ("0", "2", "9")] == [True, True, False]
    finally:
        release.set()
        queue.close()


def test_runs_whose_callers_are_gone_are_ended() -> None:
    interrupted = threading.Event()
    queue = RunQueue(QueueRules(5), lambda _: interrupted.wait(60), interrupted.set, lambda _: 10.0)
    runs = [QueuedRun(str(index), RunTerms(Repeated("denoise", {}), 2), Heard()) for index in range(3)]
    try:
        for run in runs:
            queue.put(run)
        deadline_s = time.monotonic() + 60
        while queue.forecast(2)[0] != 2 and time.monotonic() < deadline_s:
            time.sleep(0.01)
        for run in runs:
            run.state.asked_s -= 100.0
        assert queue.renew("1")
        queue.end_abandoned(50.0)
        assert [run.cancelled.is_set() for run in runs] == [True, False, False], "the one under way was interrupted"
        assert not queue.renew("2"), "the one that waited is gone"
    finally:
        interrupted.set()
        queue.close()


SIZES = ("NUM_FRAMES", "HEIGHT", "WIDTH", "STEPS")


def test_a_server_quotes_what_it_has_measured(server: Running, small: Values) -> None:
    """The step's seconds are those of its last report, within the rounding of the ledger's average."""
    video: Values = {**small, "OUTPUT": b"mp4", "PROMPT": f"a cat at {time.time()}".encode()}
    report = report_of(server.stream(video).result)
    sizes = {name: small[name] for name in SIZES}
    with Client(server.grpc_url) as client:
        got = client.quote(num_frames=17, height=64, width=96, steps=2)
    raw = server.grpc(sizes, "ti2v_quote")
    assert raw.keys() == {"SECONDS", "GPU_SECONDS", "PEAK_MEMORY_MIB", "QUEUE_WAIT_S", "REPORT"}
    assert got.report.keys() == report_of(raw).keys()
    assert got.seconds == pytest.approx(got.report["seconds"]["total"], rel=1e-6)
    assert set(got.report["seconds"]) == {"total", *PARTS}
    assert got.queue_wait_s == 0.0
    assert got.peak_memory_mib > 1.0
    assert got.report["seconds"]["vae_decode"] > 0.0
    assert got.report["tokens"] == 3 * 4 * 6
    assert set(report["seconds"]) >= {"text", "image", "vae_encode", "denoise", "vae_decode", "check", "mp4"}
    with Client(server.grpc_url) as client:
        twice = client.quote(num_frames=17, height=64, width=96, steps=4)
    denoise = [quoted.report["seconds"]["denoise"] for quoted in (got, twice)]
    assert denoise[1] - denoise[0] == pytest.approx(2 * got.report["step_seconds"])


def test_a_server_quotes_a_preset_by_its_runs(server: Running, small: Values) -> None:
    """A video, so that every stage has run; the preset's evaluations are those of the run."""
    steps = 16
    request: Values = {**small, "STEPS": np.array([steps], np.int32), "QUALITY": b"rough", "OUTPUT": b"mp4"}
    done = report_of(server.stream({**request, "PROMPT": f"a dog at {time.time()}".encode()}).result)["quality"]
    assert done["evaluations"] < steps
    size: dict[str, Any] = {"num_frames": 17, "height": 64, "width": 96, "steps": steps}
    with Client(server.grpc_url) as client:
        rough, masked, exact = (
            client.quote(**size, quality=quality) for quality in ("rough", f"mask:{done['mask']}", "exact")
        )
    assert rough.report["evaluations"]["alike"]
    assert rough.report["evaluations"]["mean"] == masked.report["evaluations"]["mean"] == done["evaluations"]
    assert 0 < rough.report["forecast_seconds"] < rough.report["step_seconds"]
    assert rough.report["seconds"]["denoise"] == pytest.approx(masked.report["seconds"]["denoise"])
    assert rough.seconds < exact.seconds
    assert any("has no price on this server" in note for note in rough.report["notes"])
    assert exact.report["notes"] == []


def test_a_server_that_is_busy_quotes_the_wait(server: Running, long: Values, small: Values) -> None:
    server.stream(small)
    with server.open(long) as running, Client(server.grpc_url) as client:
        running.wait_for_step(2)
        quotes = (
            client.quote(num_frames=17, height=64, width=96, steps=2, output="latents", priority=priority)
            for priority in (1, 2)
        )
        waits = [quote.queue_wait_s for quote in quotes]
    assert waits[0] < LONGEST_STEP_S, "it would go first, after the step under way"
    assert waits[1] > 60.0, "a hundred thousand steps are ahead"


def test_a_server_refuses_bad_quotes(server: Running, small: Values) -> None:
    with Client(server.grpc_url) as client, pytest.raises(RefusedByServer, match="NUM_FRAMES must be a positive"):
        client.quote(num_frames=5)
    with pytest.raises(Refused, match="INVALID_ARGUMENT: STEPS must be from 1"):
        server.http({**{name: small[name] for name in SIZES}, "STEPS": np.array([0], np.int32)}, "ti2v_quote")


def test_notes_that_make_no_sense_are_refused(server: Running) -> None:
    for note in (b"", b"[]", b'{"text": 1}', b'{"text": [0, 1]}', b'{"lunch": [1, 1]}', b'{"text": [NaN, 1]}'):
        with pytest.raises(Refused, match="INVALID_ARGUMENT: NOTE must be a JSON object"):
            server.grpc({"KIND": b"note", "NOTE": note}, "dit_denoiser")


@pytest.mark.slow
def test_a_fresh_server_says_what_is_missing(root: Path, config_text: str, tmp_path: Path, watch: WatchServer) -> None:
    missing = r"text, .*step has not run yet on this server: run one request"
    with (
        serving(root, tmp_path, config_text, watch) as fresh,
        Client(fresh.grpc_url) as client,
        pytest.raises(ServiceUnavailable, match=missing),
    ):
        client.quote(num_frames=17, height=64, width=96, steps=2)

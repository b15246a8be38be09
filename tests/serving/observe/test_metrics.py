"""Metrics and log lines of a real server that has seen requests of all kinds, and a rank that died."""

import json
import re
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from stepvideo_serve.launch.server import TritonServer
from stepvideo_serve.serving.observe.metric_families import FAMILIES, STAGES, codes
from tests.docker import promql
from tests.server_deaths import WatchServer
from tests.serving.calls import Refused, Server, Values, until
from tests.serving.launch import CONFIG, Engines, serving

MODELS = ("ti2v", "ti2v_unary", "text_encoder", "vae_encoder", "dit_denoiser", "vae_decoder")
PEAK_TFLOPS = 2.5
ROUGH_STEPS = 14
FORGED = b'x\n{"event": "forged"}'
SAMPLE = re.compile(r"(\w+)(?:\{(.*)\})? (\S+)")
LABEL = re.compile(r'(\w+)="([^"]*)"')

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@dataclass(frozen=True)
class Scrape:
    """What the metrics port said."""

    kinds: dict[str, str]
    samples: Samples

    def value(self, name: str, **labels: str) -> float:
        return self.samples[name, frozenset(labels.items())]


def scrape(url: str) -> Scrape:
    with urllib.request.urlopen(url, timeout=30) as response:
        lines = response.read().decode().splitlines()
    kinds = dict(line.split(" ")[2:4] for line in lines if line.startswith("# TYPE "))
    samples = {}
    for line in lines:
        if not line.startswith("#"):
            found = SAMPLE.fullmatch(line)
            assert found is not None, line
            samples[found[1], frozenset(LABEL.findall(found[2] or ""))] = float(found[3])
    return Scrape(kinds, samples)


@dataclass
class Observed:
    """A server, and what was asked of it: ended requests by model and code."""

    triton: TritonServer
    server: Server
    ended: dict[tuple[str, str], int]

    def ends(self, code: str, model: str = "ti2v") -> None:
        self.ended[model, code] = self.ended.get((model, code), 0) + 1

    def refused(self, values: Values, code: str) -> None:
        with self.server.open(values) as stream:
            assert stream.refusal().text.startswith(f"{code}: ")
        self.ends(code)

    def value(self, name: str, **labels: str) -> float:
        return scrape(self.triton.metrics_url).value(name, **labels)


@pytest.fixture(scope="module")
def observed(
    root: Path,
    engines: Engines,
    small: Values,
    long: Values,
    tmp_path_factory: pytest.TempPathFactory,
    watch: WatchServer,
) -> Iterator[Observed]:
    config = CONFIG.format(model=engines.model_dir, engines=engines.graphs_dir, max_queued=1)
    config += f'peak_tflops = {PEAK_TFLOPS}\n[logging]\nformat = "json"\n'
    with serving(root, tmp_path_factory.mktemp("observed"), config, watch) as triton:
        seen = Observed(triton, Server(triton.grpc_url, triton.http_url, triton.pid), {})
        requests_that_end_at_once(seen, small)
        requests_that_wait(seen, small, long)
        a_rank_that_dies(seen, long)
        yield seen


def requests_that_end_at_once(seen: Observed, small: Values) -> None:
    seen.server.stream({**small, "OUTPUT": b"mp4"})
    seen.ends("OK")
    seen.server.grpc({**small, "STEPS": np.array([ROUGH_STEPS], np.int32), "QUALITY": b"rough"})
    seen.ends("OK", "ti2v_unary")
    seen.refused({**small, "STEPS": np.array([0], np.int32)}, "INVALID_ARGUMENT")
    with pytest.raises(Refused):
        seen.server.grpc({**small, "OUTPUT": FORGED})
    seen.ends("INVALID_ARGUMENT", "ti2v_unary")
    seen.refused({**small, "TIMEOUT_S": np.array([1e-6], np.float32)}, "DEADLINE_EXCEEDED")


def requests_that_wait(seen: Observed, small: Values, long: Values) -> None:
    """One is parked for another, one is cancelled, one waits behind it, one finds the queue full."""
    ten_steps = {**long, "STEPS": np.array([10], np.int32)}
    with ExitStack() as stack:
        low = stack.enter_context(seen.server.open({**ten_steps, "REQUEST_PRIORITY": np.array([3], np.int32)}))
        low.wait_for_step(2)
        seen.server.stream({**small, "REQUEST_PRIORITY": np.array([1], np.int32)})
        low.collect()
        seen.ends("OK")
        seen.ends("OK")

        running = stack.enter_context(seen.server.open(long))
        running.wait_for_step(1)
        waiting = stack.enter_context(seen.server.open(small))
        assert "QUEUE_POSITION" in waiting.next()[0]
        until(lambda: seen.value("stepvideo_queue_length", priority="normal") == 1, "the queue's length")
        assert seen.value("stepvideo_running") == 1
        seen.refused(small, "RESOURCE_EXHAUSTED")
        running.cancel()
        seen.ends("CANCELLED")
        waiting.collect()
        seen.ends("OK")


def a_rank_that_dies(seen: Observed, long: Values) -> None:
    with seen.server.open({**long, "STEPS": np.array([6], np.int32)}) as stream:
        stream.wait_for_step(2)
        seen.server.rank().kill()
        stream.collect()
    seen.ends("OK")
    until(lambda: seen.value("stepvideo_rank_restarts_total") == 1, "the restart to be counted")


@pytest.fixture(scope="module")
def scraped(observed: Observed) -> Scrape:
    """Once every request has ended and been counted, also by the model that had the last turn: it has sent its result
    by then, but not necessarily said that the turn is over."""

    def counted() -> bool:
        found = scrape(observed.triton.metrics_url)
        ended = sum(found.value("stepvideo_requests_total", model="ti2v", code=code) for code in codes())
        expected = sum(count for (model, _), count in observed.ended.items() if model == "ti2v")
        return ended >= expected and found.value("stepvideo_running") == 0

    until(counted, "all requests to be counted")
    return scrape(observed.triton.metrics_url)


def test_what_is_declared_is_exported_and_nothing_else(scraped: Scrape) -> None:
    kinds = {name: kind for name, kind in scraped.kinds.items() if name.startswith("stepvideo_")}
    assert kinds == {name: family.kind for name, family in FAMILIES.items()}
    for (name, labels), _ in scraped.samples.items():
        if name.startswith("stepvideo_"):
            family = FAMILIES[name if name in FAMILIES else re.sub("_(bucket|sum|count)$", "", name)]
            assert {label for label, _ in labels} - {"le"} == set(family.labels), name


def test_the_dashboard_and_the_alerts_find_their_metrics(root: Path, scraped: Scrape) -> None:
    live = {name for name, _ in scraped.samples} | {"up"}  # `up` is Prometheus's own
    wanted = {name for text in promql.expressions(root) for name, _ in promql.selected(text)}
    assert len(wanted) > 15
    assert wanted <= live


def test_every_request_is_counted_by_its_code(observed: Observed, scraped: Scrape) -> None:
    counts = {
        (model, code): scraped.value("stepvideo_requests_total", model=model, code=code)
        for model in ("ti2v", "ti2v_unary")
        for code in codes()
    }
    assert counts == {key: observed.ended.get(key, 0) for key in counts}
    for model in ("ti2v", "ti2v_unary"):
        assert scraped.value("stepvideo_request_seconds_count", model=model) == counts[model, "OK"]


def test_the_queue_and_its_turns(observed: Observed, scraped: Scrape) -> None:
    for priority in ("urgent", "high", "normal", "low"):
        assert scraped.value("stepvideo_queue_length", priority=priority) == 0
    waits = {p: scraped.value("stepvideo_queue_wait_seconds_count", priority=p) for p in ("high", "normal", "low")}
    assert waits == {"high": 1, "normal": 5, "low": 2}, "one wait for each turn"
    assert scraped.value("stepvideo_running") == 0
    assert scraped.value("stepvideo_preemptions_total") == 1
    assert scraped.value("stepvideo_resumes_total", after="preemption") == 1
    assert scraped.value("stepvideo_resumes_total", after="rank_failure") == 1
    assert scraped.value("stepvideo_ranks_ready") == 1
    assert observed.server.rank().is_running()


def test_steps_and_what_they_computed(scraped: Scrape) -> None:
    steps = scraped.value("stepvideo_steps_total")
    counts = {
        (kind, preset): scraped.value(f"stepvideo_{kind}_total", preset=preset)
        for kind in ("evaluations", "forecasts")
        for preset in ("exact", "rough", "mask:")
    }
    assert sum(counts.values()) == steps
    assert sum(count for (kind, _), count in counts.items() if kind == "evaluations") == scraped.value(
        "stepvideo_step_seconds_count"
    )
    assert counts["forecasts", "rough"] > 0
    assert counts["forecasts", "rough"] + counts["evaluations", "rough"] == ROUGH_STEPS
    assert counts["forecasts", "exact"] == counts["evaluations", "mask:"] == 0
    assert counts["evaluations", "exact"] >= 3 * 2 + 10 + 6 + 1
    assert scraped.value("stepvideo_flops_total") > 0
    assert scraped.value("stepvideo_step_flops_per_second") > 0
    assert scraped.value("stepvideo_peak_flops_per_second") == PEAK_TFLOPS * 1e12
    assert scraped.value("stepvideo_rank_busy_seconds_total", rank="0") > 0
    assert scraped.value("stepvideo_rank_communication_seconds_total", rank="0") == 0, "there is one rank"


def test_stages_of_the_requests_that_ended_with_a_result(observed: Observed, scraped: Scrape) -> None:
    results = sum(count for (_, code), count in observed.ended.items() if code == "OK")
    counts = {stage: scraped.value("stepvideo_stage_seconds_count", stage=stage) for stage in STAGES}
    with_video = {"vae_decode": 1, "mp4": 1}
    assert counts == {stage: with_video.get(stage, results) for stage in STAGES}
    parts = sum(scraped.value("stepvideo_stage_seconds_sum", stage=stage) for stage in STAGES)
    whole = sum(scraped.value("stepvideo_request_seconds_sum", model=model) for model in ("ti2v", "ti2v_unary"))
    assert 0 < parts < whole


def test_caches(scraped: Scrape) -> None:
    assert scraped.value("stepvideo_cache_misses_total", cache="text") == 3, "two prompts, one negative prompt"
    assert scraped.value("stepvideo_cache_hits_total", cache="text") > 3
    assert scraped.value("stepvideo_cache_hits_total", cache="image") > 0


def log_lines(observed: Observed) -> list[dict[str, Any]]:
    assert observed.triton.options.log is not None
    text = observed.triton.options.log.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


@pytest.mark.usefixtures("scraped")
def test_log_lines_are_json_with_the_id_of_the_request(observed: Observed) -> None:
    lines = log_lines(observed)
    assert all({"time", "level", "model", "logger", "event"} <= line.keys() for line in lines)
    ended = [line for line in lines if line["event"] == "request_ended"]
    found: dict[tuple[str, str], int] = {}
    for line in ended:
        key = line["model"], line["code"]
        found[key] = found.get(key, 0) + 1
        assert line["seconds"] >= 0
        assert ("error" in line) == (line["code"] != "OK")
    assert found == observed.ended
    [parked] = [line for line in lines if line["event"] == "run_parked"]
    its_own = [line["event"] for line in lines if line.get("request_id") == parked["request_id"]]
    assert its_own.count("turn_began") == its_own.count("turn_ended") == 2
    assert its_own.count("request_accepted") == its_own.count("request_ended") == 1
    assert [line["failures"] for line in lines if line["event"] == "run_resumed"] == [1]


def test_a_model_that_is_stopped_is_told_by_its_heartbeat(observed: Observed, scraped: Scrape) -> None:
    beats = {model: scraped.value("stepvideo_heartbeat_timestamp_seconds", model=model) for model in MODELS}
    stub = stub_of(observed, "vae_encoder")
    stub.suspend()
    try:
        name = "stepvideo_heartbeat_timestamp_seconds"
        at = observed.value(name, model="vae_encoder")
        until(lambda: observed.value(name, model="ti2v") > at + 6, "two beats of another model")
        assert observed.value(name, model="vae_encoder") == at
    finally:
        stub.resume()
    assert beats.keys() == set(MODELS)


def stub_of(observed: Observed, model: str) -> psutil.Process:
    return observed.server.process(f"model_repository/{model}/")


def test_a_text_of_a_caller_cannot_forge_a_line(observed: Observed) -> None:
    assert not [line for line in log_lines(observed) if line["event"] == "forged"]

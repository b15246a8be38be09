"""Asks a running server whether it is well, and says so in one sentence: exit code 0 or 1.

    python -m stepvideo_serve health [--url 127.0.0.1:8000] [--level live|ready] [--timeout 5]

Triton says "ready" for a model whose process has died (always before 26.03), so every model is asked a real question,
which costs no GPU time: `dit_denoiser` how its ranks are and when the most silent one gave its last sign of life,
the others whether they answer.

    ready   every model answers, the ranks do, and the server is not told to stop: it may get requests. Also for a
            startup probe
    live    the server answers and no model's process is dead, stuck or without one of its threads: false where only a
            restart helps. Ranks that are being started anew, models that are being loaded, and requests that a
            stopping server ends are no reason

Uses the standard library only, and the HTTP port of the server. Where that needs a key (mutual TLS), the user who runs
the server must ask, with the same folder for temporary files.
"""

import argparse
import http.client
import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from typing import Any

from stepvideo_serve.errors import SetupError
from stepvideo_serve.launch.address import host_port
from stepvideo_serve.launch.http_key import find_http_key

HTTP_PORT = 8000
RANKS_MODEL = "dit_denoiser"
PUBLIC_MODELS = ("ti2v", "ti2v_unary")
LEVELS = ("ready", "live")
SERVER = "the server"
LOST_THREAD = "has lost a thread"  # in the words of a model whose process lives, but does not do all that it should


class State(Enum):
    """Of one model."""

    WELL = "answers"
    DEAD = "has lost its process"
    BROKEN = LOST_THREAD
    SILENT = "does not answer"
    ABSENT = "is not loaded"
    REFUSES = "answers with an error"


@dataclass(frozen=True)
class Answer:
    """What a model said; `report` is its REPORT where it has one, `said` its error."""

    state: State
    report: Mapping[str, Any]
    said: str = ""


@dataclass(frozen=True)
class Health:
    """Whether the server is well, a sentence about it, and each model's answer (none where the server gave none)."""

    well: bool
    sentence: str
    models: Mapping[str, Answer]


def _tensor(name: str, shape: Sequence[int], datatype: str, data: Sequence[object]) -> dict[str, object]:
    return {"name": name, "shape": list(shape), "datatype": datatype, "data": list(data)}


def questions() -> dict[str, tuple[str, dict[str, object]]]:
    """The path and the body of what each model is asked."""
    probe: dict[str, object] = {"probe": True}
    nothing: dict[str, object] = {"PROMPT": "", "IMAGE": "", **probe}
    prompt = [_tensor("PROMPT", [1], "BYTES", [""])]
    pixels = [_tensor("PIXELS", [3, 1, 1], "FP32", [0.0] * 3), _tensor("NOISE", [1, 1, 1], "FP32", [0.0])]
    image = [*prompt, _tensor("IMAGE", [1], "BYTES", [""])]
    return {
        "ti2v": ("generate_stream", nothing),
        "ti2v_unary": ("infer", {"inputs": image, "parameters": probe}),
        "ti2v_quote": ("infer", {"inputs": [], "parameters": probe}),
        "ti2v_cancel": ("infer", {"inputs": [], "parameters": probe}),
        "text_encoder": ("infer", {"inputs": prompt, "parameters": probe}),
        "vae_encoder": ("infer", {"inputs": pixels, "parameters": probe}),
        RANKS_MODEL: ("infer", {"inputs": [], "parameters": probe}),
        "vae_decoder": ("infer", {"inputs": [], "parameters": probe}),
    }


def check(url: str, level: str = "ready", timeout_s: float = 5.0) -> Health:
    """Asks the server at `url` (HOST:PORT of HTTP); takes timeout_s, about, at most. Raises SetupError for a url that
    is none."""
    status, said = _call(url, "GET", f"/v2/health/{level}", None, timeout_s)
    if status is None or (status != http.HTTPStatus.OK and level == "live"):
        return Health(False, f"not {level}: {SERVER} at {url} does not answer ({said or status}).", {})
    asked = questions()
    with ThreadPoolExecutor(len(asked)) as threads:
        answers = threads.map(lambda model: ask(url, model, timeout_s), asked)
        models = dict(zip(asked, answers, strict=True))
    problems = _problems(models, level)
    if status != http.HTTPStatus.OK and not problems:
        problems = [f"{SERVER} says that it is not ready"]
    if problems:
        return Health(False, f"not {level}: {'; '.join(problems)}.", models)
    return Health(True, f"{level}: {len(models)} models answer; {_about_ranks(models[RANKS_MODEL].report)}.", models)


def ask(url: str, model: str, timeout_s: float) -> Answer:
    """Asks one model its question."""
    verb, body = questions()[model]
    status, said = _call(url, "POST", f"/v2/models/{model}/{verb}", body, timeout_s)
    if status is None:
        return Answer(State.SILENT, {}, said)
    if status == http.HTTPStatus.OK:
        return Answer(State.WELL, _report(said))
    error = _error(said)
    if "Stub process" in error or "not healthy" in error:
        return Answer(State.DEAD, {}, error)
    if LOST_THREAD in error:
        return Answer(State.BROKEN, {}, error)
    if "unknown model" in error or "not ready" in error or "no available version" in error:
        return Answer(State.ABSENT, {}, error)
    return Answer(State.REFUSES, {}, error)


def _problems(models: Mapping[str, Answer], level: str) -> list[str]:
    """What stands against the level, as clauses."""
    fatal = (State.DEAD, State.SILENT, State.BROKEN) if level == "live" else tuple(State)
    problems = [
        f"{model} {answer.state.value}" + (f" ({answer.said})" if answer.state is State.REFUSES else "")
        for model, answer in models.items()
        if answer.state is not State.WELL and answer.state in fatal
    ]
    ranks = models[RANKS_MODEL]
    if level == "ready" and ranks.state is State.WELL and not ranks_are_well(ranks.report):
        problems.append(_about_ranks(ranks.report))
    if level == "ready" and any(models[model].report.get("stopping") for model in PUBLIC_MODELS):
        count = sum(int(models[model].report.get("unanswered", 0)) for model in PUBLIC_MODELS)
        problems.append(f"{SERVER} is shutting down, and {count} requests are still to be answered")
    return problems


def ranks_are_well(report: Mapping[str, Any]) -> bool:
    """Whether all ranks are there, and none has been silent for too long."""
    silence_s = report.get("silence_s")
    return bool(report.get("ranks_ready")) and silence_s is not None and silence_s < report["silence_limit_s"]


def _about_ranks(report: Mapping[str, Any]) -> str:
    if report.get("silence_s") is None or not report.get("ranks_ready"):
        return f"the {report.get('ranks')} ranks of {RANKS_MODEL} are being started"
    return f"the last sign of life of the most silent of {report['ranks']} ranks is {report['silence_s']:.1f} s old"


def _call(
    url: str, method: str, path: str, body: Mapping[str, object] | None, timeout_s: float
) -> tuple[int | None, str]:
    """Status and text; None and the reason where nothing came."""
    host, port = host_port(url, HTTP_PORT)
    connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    try:
        content = None if body is None else json.dumps(body)
        connection.request(method, path, content, find_http_key(host, port))
        response = connection.getresponse()
        return response.status, response.read().decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        return None, str(error) or type(error).__name__
    finally:
        connection.close()


def _report(said: str) -> Mapping[str, Any]:
    """REPORT among the outputs of a response, or of a stream's first event; else nothing."""
    if said.startswith("data: "):
        return dict(json.loads(json.loads(said.partition("\n")[0].removeprefix("data: ")).get("REPORT", "{}")))
    outputs = json.loads(said).get("outputs", [])
    return next((json.loads(output["data"][0]) for output in outputs if output["name"] == "REPORT"), {})


def _error(said: str) -> str:
    try:
        return str(json.loads(said.removeprefix("data: "))["error"])
    except (ValueError, KeyError, TypeError):
        return said[:200]


def main(argv: Sequence[str] | None = None) -> int:
    """0 if the server is well, else 1; 2 for a wrong command line."""
    parser = argparse.ArgumentParser(
        prog="python -m stepvideo_serve health", description="Asks a running server whether it is well."
    )
    parser.add_argument("--url", default="127.0.0.1:8000", metavar="HOST[:PORT]", help="of HTTP; default: %(default)s")
    parser.add_argument("--level", choices=LEVELS, default="ready", help="default: %(default)s")
    parser.add_argument("--timeout", type=float, default=5.0, metavar="S", help="per question; default: %(default)g s")
    arguments = parser.parse_args(argv)
    try:
        health = check(arguments.url, arguments.level, arguments.timeout)
    except SetupError as error:
        parser.error(str(error))
    print(health.sentence, file=sys.stdout if health.well else sys.stderr)
    return 0 if health.well else 1

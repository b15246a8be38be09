"""A job's trace is its request's, in the gateway's log and at the server."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stepvideo_client import Client, InvalidInput
from stepvideo_gateway.traces import trace_id_of, traceparent_of
from stepvideo_serve.launch.server import TritonServer
from tests.gateway.conftest import Running, create, health, until

SPAN = "b7ad6b7169203331"
VALID = f"00-{'a' * 31}1-{SPAN}-01"


def lines_about(log: Path, video_id: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line.get("job") == video_id]


@pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
@pytest.mark.parametrize("header", [f"00-{'c' * 31}3-{SPAN}-01", None, "nonsense"])
def test_gateway_and_server_name_the_same_trace(
    start: Callable[..., Running], triton: TritonServer, picture: bytes, tmp_path: Path, header: str | None
) -> None:
    gateway = start(logging='format = "json"')
    until(lambda: health(gateway)["well"], "the server to be seen")
    video = create(gateway, picture, extra_headers={} if header is None else {"traceparent": header})
    assert gateway.client().videos.poll(video.id, poll_interval_ms=200).status == "completed"
    log = tmp_path / "gateway1.log"
    until(lambda: any("job_completed" in line["message"] for line in lines_about(log, video.id)), "the log to say so")
    told = lines_about(log, video.id)
    words = " ".join(line["message"] for line in told)
    assert words.index("create job=") < words.index("job_sent") < words.index("job_completed")
    [trace_id] = {line["trace_id"] for line in told}
    if header not in (None, "nonsense"):
        assert trace_id == trace_id_of(header)
    assert triton.options.log is not None
    of_server = [line for line in triton.options.log.read_text(encoding="utf-8").splitlines() if video.id in line]
    assert any("request_accepted" in line for line in of_server)
    assert any("turn_ended" in line for line in of_server)
    assert {found for line in of_server for found in re.findall(r"trace_id=\W*([0-9a-f]{32})", line)} == {trace_id}


@pytest.mark.parametrize(
    ("headers", "kept"),
    [
        ([VALID], VALID),
        ([f"cc{VALID[2:]}-more"], VALID),
        ([], None),
        ([VALID, VALID], None),
        ([f"{VALID}-more"], None),
        ([f"ff{VALID[2:]}"], None),
        ([VALID.upper()], None),
        ([f"00-{'0' * 32}-{SPAN}-01"], None),
        ([f"00-{'1' * 32}-{'0' * 16}-01"], None),
        ([VALID[:-1]], None),
    ],
)
def test_a_valid_traceparent_is_kept_and_others_are_replaced(headers: list[str], kept: str | None) -> None:
    made = traceparent_of(headers, 1.0)
    assert traceparent_of([made], 0.0) == made, "it is valid itself"
    assert (made == kept) if kept else (made not in headers and made.endswith("-01"))


@pytest.mark.parametrize(("chance", "flags"), [(0.24, "01"), (0.25, "00")])
def test_new_traces_have_spans_in_the_share_that_is_configured(chance: float, flags: str) -> None:
    assert traceparent_of([], 0.25, lambda: chance).endswith(f"-{flags}")


def test_the_client_refuses_what_is_no_traceparent() -> None:
    with (
        Client("127.0.0.1:1") as client,
        pytest.raises(InvalidInput, match=r"traceparent must be .* hexadecimal digits .*, got 'x'"),
    ):
        client.generate(b"png", "a cat", traceparent="x")

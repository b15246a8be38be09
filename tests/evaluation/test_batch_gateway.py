"""What `stepvideo batch` asks a gateway for, and what it does about gateways that fail: with scripted ones.

tests/gateway/test_gateway_batch.py has the real gateway in front of the real server.
"""

import base64
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
import trustme

from stepvideo_client.evaluation.gateway_http import KEY_VARIABLE, gateway_address
from tests.client.fake_server import MP4, FakeServer
from tests.evaluation.conftest import Completed
from tests.evaluation.scripted import clips
from tests.evaluation.scripted_gateway import Trouble, refusal, scripted_gateway

Run = Callable[..., Completed]
ONE = ("--only", "a_*")


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whoever runs the tests."""
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


def test_the_fields_of_the_api_and_the_line_in_the_folder(
    stepvideo: Run, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "sk-secret\n")
    with scripted_gateway() as gateway:
        options = ("--quality", "mask:11", "--motion-score", 10, "--seed", 3, "--negative-prompt", "dark", *ONE)
        done = stepvideo("batch", pairs, "--out", tmp_path, "--url", f"{gateway.url}/v1/", *options)
    assert done.returncode == 0, done.stderr
    assert "sk-secret" not in done.stdout + done.stderr
    [(_, _, headers, body)] = gateway.calls("POST /v1/videos")
    picture = body.pop("input_reference")
    assert base64.b64decode(picture.partition("base64,")[2]) == (pairs / "a_wide.png").read_bytes()
    assert body == {
        "prompt": "一只猫伸懒腰。",
        "size": "48x32",
        "num_frames": 17,
        "num_inference_steps": 2,
        "guidance_scale": 9.0,
        "flow_shift": 7.0,
        "motion_score": 10.0,
        "quality": "mask:11",
        "seed": 3,
        "negative_prompt": "dark",
        "priority": "low",
    }
    assert headers["idempotency-key"].endswith("-3")
    assert {call[2]["authorization"] for call in gateway.asked} == {"Bearer sk-secret"}
    [clip] = clips(tmp_path)
    assert (tmp_path / clip.video).read_bytes() == MP4
    assert (clip.seed, clip.preset, clip.evaluations_mask, clip.server) == (3, "mask:11", None, f"{gateway.url}/v1/")
    assert clip.report["gateway"]["id"] == "video_1"
    assert not gateway.jobs, "what is in the folder need not be kept there"


@pytest.mark.parametrize("servers", [1, 3])
def test_every_server_behind_it_is_kept_busy(stepvideo: Run, pairs: Path, tmp_path: Path, servers: int) -> None:
    with scripted_gateway(servers, crowd=2 * servers) as gateway:
        done = stepvideo("batch", pairs, "--out", tmp_path, "--url", gateway.url, "--seed", *range(6))
    assert done.returncode == 0, done.stderr
    assert len(clips(tmp_path)) == 18
    assert (gateway.most_running, gateway.most_waiting) == (servers, servers)


def test_a_dry_run_tells_what_its_servers_take_together(stepvideo: Run, pairs: Path, tmp_path: Path) -> None:
    with scripted_gateway(2) as gateway:
        done = stepvideo(
            "batch", pairs, "--out", tmp_path / "out", "--url", gateway.url, "--dry-run", "--seed", *range(5)
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{gateway.url}: 15 hours, 60 GPU-hours\n"
    assert not gateway.calls("POST /v1/videos")


@pytest.mark.parametrize(
    ("call", "trouble", "creations"),
    [
        ("POST /v1/videos", refusal(429, "At most 3 jobs may wait, 3 do: try again later."), 2),
        ("POST /v1/videos", refusal(503, "The database is away."), 2),
        ("GET /v1/videos", refusal(503, "The database is away."), 1),
        ("GET /v1/videos/video_1/content", Trouble(200, MP4[:100], length=len(MP4)), 1),
        ("GET /v1/videos", Trouble(502, b"<html>Bad Gateway</html>"), 1),
        ("GET /health", Trouble(404, b"not here"), 1),
    ],
)
def test_a_gateway_that_is_away_for_a_while_costs_no_attempt(
    stepvideo: Run, pairs: Path, tmp_path: Path, call: str, trouble: Trouble, creations: int
) -> None:
    with scripted_gateway() as gateway:
        gateway.troubles = {call: [trouble]}
        done = stepvideo("batch", pairs, "--out", tmp_path, "--url", gateway.url, "--attempts", 1, *ONE)
    assert done.returncode == 0, done.stderr
    assert len(gateway.calls("POST /v1/videos")) == creations
    assert [(tmp_path / clip.video).read_bytes() for clip in clips(tmp_path)] == [MP4]


def test_a_failed_job_is_removed_and_another_made(stepvideo: Run, pairs: Path, tmp_path: Path) -> None:
    """Its Idempotency-Key would give the failed one again, also to a later batch."""
    command = ("batch", pairs, "--out", tmp_path, *ONE)
    with scripted_gateway() as gateway:
        gateway.failing = [("server_error", "3 attempts failed, the last one so: A rank died.")]
        gateway.troubles = {"DELETE /v1/videos/video_1": [refusal(503, "The database is away.")]}
        done = stepvideo(*command, "--url", gateway.url)
        assert done.returncode == 0, done.stderr
        assert "INTERNAL: 3 attempts failed, the last one so: A rank died." in done.stderr
        assert [call[1] for call in gateway.calls("DELETE")] == [
            "/v1/videos/video_1",
            "/v1/videos/video_1",
            "/v1/videos/video_3",
        ]
        assert clips(tmp_path)[0].report["gateway"]["id"] == "video_3"


def test_a_request_that_the_servers_refuse_is_given_up_at_once(stepvideo: Run, pairs: Path, tmp_path: Path) -> None:
    with scripted_gateway() as gateway:
        gateway.failing = [("invalid_request", "IMAGE must be RGB, got CMYK.")]
        done = stepvideo("batch", pairs, "--out", tmp_path, "--url", gateway.url, "--quiet")
    assert done.returncode == 1
    assert done.stderr.count("cannot be made: INVALID_ARGUMENT: IMAGE must be RGB, got CMYK.") == 1
    assert len(clips(tmp_path)) == 2
    assert len(gateway.calls("POST /v1/videos")) == 3


def test_it_shares_with_a_server(server: FakeServer, stepvideo: Run, pairs: Path, tmp_path: Path) -> None:
    with scripted_gateway() as gateway:
        done = stepvideo("batch", pairs, "--out", tmp_path, "--url", gateway.url, server.url, "--seed", *range(6))
    assert done.returncode == 0, done.stderr
    assert {clip.server for clip in clips(tmp_path)} == {gateway.url, server.url}
    assert len(clips(tmp_path)) == 18


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        (refusal(401, "An API key is needed: send the header Authorization: Bearer KEY."), KEY_VARIABLE),
        (refusal(403, "quality must be one of exact with this key, got 'fast'."), "PERMISSION_DENIED: quality must be"),
        (refusal(400, "QUALITY must be one of exact, fast."), "INVALID_ARGUMENT: QUALITY must be"),
        (Trouble(308, b"", {"location": "https://elsewhere/v1/quotes"}), "sends callers on to 'https://elsewhere"),
        (Trouble(404, b"no such thing"), "must be a gateway or HOST:PORT of a server's gRPC"),
    ],
)
def test_what_a_gateway_refuses_ends_the_batch_before_the_first_clip(
    stepvideo: Run, pairs: Path, tmp_path: Path, trouble: Trouble, words: str
) -> None:
    with scripted_gateway() as gateway:
        gateway.troubles = {"POST /v1/quotes": [trouble]}
        done = stepvideo("batch", pairs, "--out", tmp_path / "out", "--url", gateway.url)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_before_the_first_video_the_settings_must_be_stated(stepvideo: Run, pairs: Path, tmp_path: Path) -> None:
    """A gateway learns its servers' defaults from quotes, which need a run."""
    fresh = refusal(503, "No server can tell yet: servers must be ready, and have made a video before.")
    with scripted_gateway() as gateway:
        gateway.troubles = {"POST /v1/quotes": [fresh, fresh, fresh]}
        command = ("batch", pairs, "--out", tmp_path / "out", "--url", gateway.url, *ONE)
        unknown = stepvideo(*command)
        assert unknown.returncode == 1
        assert "Or state --num-frames, --infer-steps, --cfg-scale, --time-shift, --landscape, --mot" in unknown.stderr
        stated = ("--num-frames", 17, "--infer-steps", 2, "--cfg-scale", 4, "--time-shift", 7, "--landscape", "32x48")
        done = stepvideo(*command, *stated, "--motion-score", 5)
        assert done.returncode == 0, done.stderr
        assert not gateway.troubles["POST /v1/quotes"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--latents"], "does not deliver LATENTS"),
        (["--positive-suffix", "sharp"], "does not deliver --positive-suffix"),
        (["--negative-prompt", ""], "does not deliver an empty negative prompt"),
        (["--tls"], "write https://"),
        (["--url", "http://user@host"], "must be http(s)://HOST[:PORT]"),
        (["--header", "X=ä"], "--header 'X' must be a header of HTTP"),
        (["--header", "X Y=1"], "--header 'X Y' must be a header of HTTP"),
        (["--idle-timeout", "0"], "more than 0 seconds"),
    ],
)
def test_what_a_gateway_does_not_deliver_is_refused(
    stepvideo: Run, pairs: Path, tmp_path: Path, options: list[str], words: str
) -> None:
    done = stepvideo("batch", pairs, "--out", tmp_path / "out", "--url", "http://127.0.0.1:1", *options)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_compare_looks_at_both_sides_before_it_makes_the_first(
    server: FakeServer, stepvideo: Run, pairs: Path, tmp_path: Path
) -> None:
    sides = ("--a", server.url, "--b", "http://127.0.0.1:1,quality=exact", "--price-file", tmp_path / "p.json")
    refused = stepvideo("compare", "--set", pairs, *sides, "--out", tmp_path / "out")
    assert refused.returncode == 2
    assert "The gateway http://127.0.0.1:1 does not deliver LATENTS" in refused.stderr
    assert not server.requests


def test_another_machine_without_encryption_is_warned_of_once(
    stepvideo: Run, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through a proxy of the environment, which here is the gateway itself."""
    with scripted_gateway() as gateway:
        monkeypatch.setenv("http_proxy", gateway.url)
        monkeypatch.setenv("no_proxy", "")
        done = stepvideo("batch", pairs, "--out", tmp_path, "--url", "http://gateway.invalid", "--header", "X=1")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("are not encrypted, others can read prompts, images, videos, the header X") == 1
    assert len(clips(tmp_path)) == 3


def test_https_with_the_files_of_the_command_line(stepvideo: Run, pairs: Path, tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    with scripted_gateway() as gateway:
        gateway.socket = context.wrap_socket(gateway.socket, server_side=True)
        url = gateway.url.replace("http:", "https:")
        command = ("batch", pairs, "--out", tmp_path / "out", "--url", url, *ONE)
        refused = stepvideo(*command)
        assert refused.returncode == 3
        assert "CERTIFICATE_VERIFY_FAILED" in refused.stderr
        done = stepvideo(*command, "--root-certificates", tmp_path / "ca.pem")
        assert done.returncode == 0, done.stderr
    missing = stepvideo(*command, "--root-certificates", tmp_path / "none.pem")
    assert missing.returncode == 2
    assert "none.pem cannot be used: No such file or directory." in missing.stderr


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://host:8010", "http://host:8010"),
        ("HTTPS://Host/v1", "https://Host"),
        ("https://host/videos/v1/", "https://host/videos"),
        ("http://[::1]:8010/", "http://[::1]:8010"),
    ],
)
def test_addresses(url: str, base: str) -> None:
    assert gateway_address(url).geturl() == base

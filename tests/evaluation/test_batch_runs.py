"""What `stepvideo batch` does about servers that fail, are full or absent: with scripted servers."""

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from stepvideo_client import cli
from stepvideo_client.evaluation.commands import INSTALL
from stepvideo_client.evaluation.results import read_clips
from tests.client.fake_server import MP4, Action, FakeServer, abort, error, final, result, step, wait
from tests.evaluation.conftest import Completed
from tests.evaluation.scripted import DEFAULTS, DONE, clips, streams, times, told

Run = Callable[..., Completed]
NOBODY = "127.0.0.1:1"


def test_every_clip_is_asked_for_and_kept(server: FakeServer, stepvideo: Run, pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("batch", pairs, "--out", out, "--url", server.url, "--seed", 3, 4, "--motion-score", 5, 10)
    done = stepvideo(*command)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out}: 12 of 12 clips, 12 made now, 0 given up\n"
    assert "3 entries in the set; 12 clips here (4 of 32x48, 4 of 48x32, 4 of 32x32), 12 to make" in done.stderr
    assert "12/12 clips" in done.stderr
    assert "an hour  0:00 left" in done.stderr
    names = [f"{prompt}-{index}.mp4" for prompt in ("一只猫伸懒腰。", "A dog barks.", "旋转的球") for index in range(4)]
    assert sorted(path.name for path in (out / "videos").iterdir()) == sorted(names)
    assert all((out / "videos" / name).read_bytes() == MP4 for name in names)
    sent = [inputs for inputs in streams(server) if inputs["PROMPT"] == b"A dog barks."]
    assert [(inputs["SEED"], inputs["MOTION_SCORE"]) for inputs in sent] == [(3, 5), (4, 5), (3, 10), (4, 10)]
    assert {(inputs["HEIGHT"], inputs["WIDTH"], inputs["REQUEST_PRIORITY"]) for inputs in sent} == {(48, 32, 3)}
    assert len({inputs["REQUEST_ID"] for inputs in streams(server)}) == 12
    clip = read_clips(out)["b_high", 2]
    assert (clip.video, clip.bytes, clip.server) == ("videos/A dog barks.-2.mp4", len(MP4), server.url)
    assert clip.request == {
        **DEFAULTS,
        "height": 48,
        "width": 32,
        "motion_score": 10.0,
        "quality": "exact",
        "seed": 3,
    }
    asked = len(server.requests)
    again = stepvideo(*command)
    assert again.returncode == 0, again.stderr
    assert again.stdout == f"{out}: 12 of 12 clips, 0 made now, 0 given up\n"
    assert not [request for request in server.requests[asked:] if request.model_name == "ti2v"]


def test_other_arguments_are_refused_and_a_larger_part_is_not(
    server: FakeServer, stepvideo: Run, pairs: Path, tmp_path: Path
) -> None:
    command = ("batch", pairs, "--out", tmp_path / "out", "--url", server.url)
    assert stepvideo(*command, "--only", "a_*", "--infer-steps", 3).returncode == 0
    refused = stepvideo(*command, "--infer-steps", 4)
    assert refused.returncode == 2
    assert "other arguments (settings steps: 3 there, 4 here): repeat those, or name another --out." in refused.stderr
    grown = stepvideo(*command)  # what is not given is as the folder was begun
    assert grown.returncode == 0, grown.stderr
    assert {inputs["STEPS"] for inputs in streams(server)} == {3}
    assert len(clips(tmp_path / "out")) == 3
    (pairs / "a_wide.txt").write_text("another prompt")
    assert "set digest" in stepvideo(*command).stderr


def test_what_is_not_whole_is_made_again(server: FakeServer, stepvideo: Run, pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("batch", pairs, "--out", out, "--url", server.url)
    assert stepvideo(*command).returncode == 0
    whole = (out / "results.jsonl").read_bytes()
    (out / "videos" / "旋转的球-0.mp4").write_bytes(MP4[:-1])
    (out / "results.jsonl").write_bytes(whole[:-30])
    done = stepvideo(*command)
    assert done.returncode == 0, done.stderr
    assert {clip.id for clip in clips(out)} == {"a_wide", "b_high", "c_square"}
    assert all((out / clip.video).read_bytes() == MP4 for clip in clips(out))


@pytest.mark.parametrize(
    ("trouble", "attempts"),
    [
        (error("INTERNAL: a rank died."), 2),
        (error("RESOURCE_EXHAUSTED: At most 8 requests may wait, 8 do: try again later."), 1),
        (error("UNAVAILABLE: The server is stopping."), 1),
        (abort(grpc.StatusCode.UNAVAILABLE, "connection reset"), 1),
        (error("CANCELLED: The request was cancelled."), 2),
        (final(), 2),
    ],
)
def test_a_failure_is_followed_by_another_attempt(
    server: FakeServer, stepvideo: Run, pairs: Path, tmp_path: Path, trouble: Action, attempts: int
) -> None:
    """A full queue and an absent server are no failures of the clip: they do not count."""
    server.script = [times(1, trouble), *DONE]
    command = ("batch", pairs, "--out", tmp_path, "--url", server.url, "--only", "a_*", "--attempts", attempts)
    done = stepvideo(*command)
    assert done.returncode == 0, done.stderr
    assert len(streams(server)) == 2
    assert "rests 1 s after" in done.stderr
    assert len(clips(tmp_path)) == 1


def test_what_no_server_takes_is_given_up_and_the_rest_is_made(
    server: FakeServer, stepvideo: Run, pairs: Path, tmp_path: Path
) -> None:
    def refuse_dogs(server: FakeServer, context: Any) -> Any:
        refused = error("INVALID_ARGUMENT: IMAGE must be RGB, got CMYK.")
        return refused(server, context) if server.sent()["PROMPT"] == b"A dog barks." else None

    server.script = [refuse_dogs, *DONE]
    done = stepvideo("batch", pairs, "--out", tmp_path, "--url", server.url, "--quiet")
    assert done.returncode == 1
    message = "A dog barks.-0 cannot be made: INVALID_ARGUMENT: IMAGE must be RGB, got CMYK."
    assert done.stderr == f"stepvideo: {message}\n"
    assert sorted(clip.id for clip in clips(tmp_path)) == ["a_wide", "c_square"]
    assert len(streams(server)) == 3, "asked for once"


def test_a_server_that_fails_everything_ends_the_batch(
    server: FakeServer, stepvideo: Run, pairs: Path, tmp_path: Path
) -> None:
    server.script = [error("INVALID_ARGUMENT: SEED must be from 0 to 4294967295.")]
    done = stepvideo("batch", pairs, "--out", tmp_path, "--url", server.url, "--seed", *range(4))
    assert done.returncode == 2
    assert "8 clips in a row could not be made, the last because: SEED must be from 0" in done.stderr
    assert len(streams(server)) == 8


def test_several_servers_share_and_one_may_be_absent(
    server: FakeServer, stepvideo: Run, pairs: Path, tmp_path: Path
) -> None:
    with FakeServer(unary=told(), script=[wait(0.1), *DONE]) as other:
        urls = (NOBODY, server.url, other.url)
        server.script = [wait(0.1), *DONE]
        done = stepvideo("batch", pairs, "--out", tmp_path, "--url", *urls, "--seed", *range(4))
        assert done.returncode == 0, done.stderr
        made = {url: sum(clip.server == url for clip in clips(tmp_path)) for url in urls}
        assert made[NOBODY] == 0
        assert min(made[server.url], made[other.url]) >= 3
        assert sum(made.values()) == 12


def test_a_clip_that_one_server_fails_goes_to_another(
    server: FakeServer, stepvideo: Run, pairs: Path, tmp_path: Path
) -> None:
    with FakeServer(unary=told(), script=[error("INTERNAL: broken.")]) as broken:
        command = ("batch", pairs, "--out", tmp_path, "--url", broken.url, server.url, "--attempts", 2)
        done = stepvideo(*command)
        assert done.returncode == 0, done.stderr
        assert {clip.server for clip in clips(tmp_path)} == {server.url}


def test_it_gives_up_when_no_server_answers_for_long(
    server: FakeServer, stepvideo: Run, pairs: Path, tmp_path: Path
) -> None:
    server.script = [abort(grpc.StatusCode.UNAVAILABLE, "down")]
    done = stepvideo("batch", pairs, "--out", tmp_path, "--url", server.url, "--patience", 0.5)
    assert done.returncode == 3
    assert "No server was heard of for" in done.stderr
    assert stepvideo("batch", pairs, "--out", tmp_path / "o", "--url", NOBODY).returncode == 3
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("waiting", [1, 2])
def test_the_queue_is_full_and_no_fuller(
    server: FakeServer, stepvideo: Run, pairs: Path, tmp_path: Path, waiting: int
) -> None:
    """A server of one rank: one clip runs, `waiting` wait behind it, and no more are sent."""
    turn, lock, queued, most = threading.Lock(), threading.Lock(), [0], [0]

    def arrive(_server: FakeServer, _context: Any) -> None:
        with lock:
            queued[0] += 1
            most[0] = max(most[0], queued[0])

    def begin(_server: FakeServer, _context: Any) -> None:
        assert turn.acquire(timeout=30)
        with lock:
            queued[0] -= 1

    def end(_server: FakeServer, _context: Any) -> None:
        turn.release()

    place = step(0, 2, QUEUE_POSITION=np.array([1], np.int32))
    server.script = [arrive, place, begin, step(1, 2), wait(0.15), end, step(2, 2), result(), final()]
    command = ("batch", pairs, "--out", tmp_path, "--url", server.url, "--seed", 0, 1, "--waiting", waiting)
    done = stepvideo(*command)
    assert done.returncode == 0, done.stderr
    assert most[0] == waiting
    assert len(clips(tmp_path)) == 6


def test_clips_do_not_pile_up_where_decoding_is_slow(
    server: FakeServer, stepvideo: Run, pairs: Path, tmp_path: Path
) -> None:
    """Every clip begins at once, and its result takes long."""
    lock, open_now, most = threading.Lock(), [0], [0]

    def count(change: int) -> Action:
        def act(_server: FakeServer, _context: Any) -> None:
            with lock:
                open_now[0] += change
                most[0] = max(most[0], open_now[0])

        return act

    server.script = [count(1), step(1, 2), step(2, 2), wait(0.3), count(-1), result(), final()]
    done = stepvideo("batch", pairs, "--out", tmp_path, "--url", server.url, "--seed", 0, 1, 2)
    assert done.returncode == 0, done.stderr
    assert most[0] == 3


def test_latents_are_a_second_run(server: FakeServer, stepvideo: Run, pairs: Path, tmp_path: Path) -> None:
    latents = np.arange(24, dtype=np.float32).reshape(3, 2, 2, 2)

    def answer(server: FakeServer, context: Any) -> Any:
        asked = server.sent()["OUTPUT"]
        return (result(LATENTS=latents) if asked == b"latents" else result())(server, context)

    server.script = [step(1, 2), answer, final()]
    command = ("batch", pairs, "--out", tmp_path, "--url", server.url, "--only", "a_*", "--latents")
    done = stepvideo(*command)
    assert done.returncode == 0, done.stderr
    [clip] = clips(tmp_path)
    assert clip.latents == "latents/一只猫伸懒腰。-0.npy"
    np.testing.assert_array_equal(np.load(tmp_path / clip.latents), latents)
    assert [inputs["OUTPUT"] for inputs in streams(server)] == [b"mp4", b"latents"]
    assert "latents" not in clip.request


def test_a_dry_run_tells_hours_and_makes_nothing(
    server: FakeServer, stepvideo: Run, pairs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with FakeServer(unary=told()) as other:
        urls = (server.url, other.url)
        done = stepvideo("batch", pairs, "--out", out, "--url", *urls, "--dry-run", "--seed", *range(5), "--latents")
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == [
            f"{server.url}: 60 hours, 120 GPU-hours",
            f"{other.url}: 60 hours, 120 GPU-hours",
            "together: 30 hours, 120 GPU-hours",
        ]
    assert not out.exists()
    assert not streams(server)
    partly = stepvideo("batch", pairs, "--out", out, "--url", server.url, NOBODY, "--dry-run")
    assert partly.returncode == 1
    assert partly.stdout == f"{server.url}: 6 hours, 12 GPU-hours\n"
    assert f"{NOBODY} cannot tell: UNAVAILABLE" in partly.stderr


def test_a_preset_that_a_server_does_not_have_is_refused_before_the_first_clip(
    server: FakeServer, stepvideo: Run, pairs: Path, tmp_path: Path
) -> None:
    def refuse(server: FakeServer, context: Any) -> Any:
        if server.requests[-1].model_name == "ti2v_quote":
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT: QUALITY must be one of exact, fast.")
        return told()(server, context)

    server.unary = refuse
    done = stepvideo("batch", pairs, "--out", tmp_path / "out", "--url", server.url, "--quality", "quick")
    assert done.returncode == 2
    assert "QUALITY must be one of exact, fast." in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--shard", "3/2"], "must be K/N with K from 1 to N, got '3/2'"),
        (["--landscape", "wide"], "must be HxW, such as 544x992, got 'wide'"),
        (["--attempts", "0"], "must be at least 1, got 0"),
        (["--limit", "none"], "invalid"),
        (["--only", "zzz"], "No entry is left by --only, --dimension and --limit"),
        (["--url", "localhost", "localhost"], "--url must name each server once, got localhost more than once"),
        (["--header", "x"], "--header must be NAME=VALUE"),
    ],
)
def test_wrong_options_are_refused(
    server: FakeServer, stepvideo: Run, pairs: Path, tmp_path: Path, options: list[str], words: str
) -> None:
    done = stepvideo("batch", pairs, "--out", tmp_path / "out", "--url", server.url, *options)
    assert done.returncode == 2
    assert words in done.stderr
    assert not (tmp_path / "out").exists()


def test_without_the_extra_the_list_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines() if f"(first: {INSTALL})" in line]
    assert lines == ["batch", "metrics", "compare"]
    assert cli.main(["batch", str(tmp_path), "--out", str(tmp_path)]) == 2
    expected = "stepvideo batch needs cv2, not installed here: pip install 'stepvideo-client[evaluation]'."
    assert expected in capsys.readouterr().err

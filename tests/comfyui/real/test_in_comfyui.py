"""The pack in a real ComfyUI: video, frames, progress, preview, interrupt, errors, caching, examples."""

import copy
import io
import json
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.comfyui.real.comfy import Comfy, Run
from tests.comfyui.real.workflows import prompt_of
from tests.gateway.conftest import Running
from tests.video.decode import decode_mp4

PROMPT = "红色圆形向右移动。"
SETTINGS = {
    "prompt": PROMPT,
    "negative_prompt": "",
    "camera_movement": "none",
    "motion_score": 5.0,
    "width": 64,
    "height": 64,
    "num_frames": 34,
    "steps": 8,
    "guidance": 4.0,
    "shift": 7.0,
    "quality": "exact",
    "other_preset": "",
    "priority": "normal",
    "seed": 7,
}
LONG: dict[str, Any] = {"steps": 1000, "width": 192, "height": 192}  # as many as a node takes
VIDEO, SAVED, SHOWN = "3", "4", "5"


def workflow(url: str = "", idle_timeout_s: float = 60.0, **more: Any) -> dict[str, dict[str, Any]]:
    """Load Image -> image to video -> Save Video, Preview Image and Preview Any."""
    server = {"url": url, "api_key": "", "idle_timeout_s": idle_timeout_s}
    inputs = {"server": ["1", 0], "image": ["2", 0], **SETTINGS, **more}
    return {
        "1": {"class_type": "StepVideoServer", "inputs": server},
        "2": {"class_type": "LoadImage", "inputs": {"image": "example.png"}},
        VIDEO: {"class_type": "StepVideoImageToVideo", "inputs": inputs},
        SAVED: {
            "class_type": "SaveVideo",
            "inputs": {"video": [VIDEO, 0], "filename_prefix": "made", "format": "auto", "codec": "auto"},
        },
        SHOWN: {"class_type": "PreviewImage", "inputs": {"images": [VIDEO, 1]}},
        "6": {"class_type": "PreviewAny", "inputs": {"source": [VIDEO, 2]}},
    }


def videos(gateway: Running) -> list[dict[str, Any]]:
    with urllib.request.urlopen(f"{gateway.url}/v1/videos?limit=100") as answer:
        return list(json.load(answer)["data"])


def of_gateway(gateway: Running, video_id: str) -> bytes:
    with urllib.request.urlopen(f"{gateway.url}/v1/videos/{video_id}/content") as answer:
        return bytes(answer.read())


def saved(comfy: Comfy, run: Run, node: str = SAVED) -> bytes:
    [file] = run.output(node)["images"]
    return bytes((comfy.base / "output" / file["subfolder"] / file["filename"]).read_bytes())


def test_a_workflow_makes_the_servers_video(comfy: Comfy, gateway: Running) -> None:
    run = comfy.run(workflow())
    assert run.end == "execution_success", run.messages[-1]
    [video] = [one for one in videos(gateway) if one["prompt"] == PROMPT]
    theirs, speed = decode_mp4(of_gateway(gateway, video["id"]))
    ours, our_speed = decode_mp4(saved(comfy, run))
    assert our_speed == speed
    assert (ours == theirs).all(), "the very frames of the server"
    frames = run.output(SHOWN)["images"]
    assert len(frames) == len(theirs) == 34
    with Image.open(comfy.base / frames[-1]["type"] / frames[-1]["subfolder"] / frames[-1]["filename"]) as shown:
        assert shown.size == (64, 64)
    [report] = run.output("6")["text"]
    size, settings, where = report.splitlines()
    assert size == "64x64, 34 frames, 1.36 s, seed 7"
    assert settings == "steps 8, guidance 4, shift 7, motion score 5, quality exact"
    assert where.startswith(f"{video['id']} at {gateway.url}, took ")
    texts = [text for node, text in run.texts if node == VIDEO]
    assert any(text.startswith("Step ") for text in texts), texts
    assert texts[-1] == report


def test_the_preview_moves_in_the_node(comfy: Comfy) -> None:
    run = comfy.run(workflow(seed=11, steps=60))
    assert run.end == "execution_success", run.messages[-1]
    pictures = [Image.open(io.BytesIO(file)) for node, file in run.previews if node == VIDEO]
    assert len({picture.tobytes() for picture in pictures}) > 2
    assert all(max(picture.size) <= 512 for picture in pictures)


def test_nothing_is_computed_again(comfy: Comfy, gateway: Running) -> None:
    first = comfy.run(workflow(seed=21))
    before = [video["id"] for video in videos(gateway)]
    again = comfy.run(workflow(seed=21))
    assert VIDEO in again.of("execution_cached")[0]["nodes"]
    comfy.post("/free", {"unload_models": True, "free_memory": True})
    time.sleep(1.0)  # its worker looks for that between two workflows
    anew = comfy.run(workflow(seed=21))
    assert VIDEO not in anew.of("execution_cached")[0]["nodes"], "ComfyUI has forgotten it, the gateway has not"
    assert [video["id"] for video in videos(gateway)] == before
    assert "it was there already" in anew.output("6")["text"][0]
    assert (decode_mp4(saved(comfy, anew))[0] == decode_mp4(saved(comfy, first))[0]).all()
    comfy.run(workflow(seed=22))
    assert len(videos(gateway)) == len(before) + 1


def test_an_interrupt_ends_the_run_on_the_server(comfy: Comfy, gateway: Running) -> None:
    interrupted_s = 0.0

    def stop(run: Run) -> bool:
        nonlocal interrupted_s
        if not any(at[0] >= 2 and at[1] == LONG["steps"] for at in run.steps(VIDEO)):
            return False
        comfy.post("/interrupt", {})
        interrupted_s = time.monotonic()
        return True

    run = comfy.run(workflow(seed=31, **LONG), stop)
    assert run.end == "execution_interrupted"
    assert time.monotonic() - interrupted_s < 10.0, "the bound of the gateway's own wait, not of a run of minutes"
    assert not [video for video in videos(gateway) if video["seed"] == 31]
    assert comfy.run(workflow(seed=32)).end == "execution_success", "the ranks are free"


def test_an_interrupt_ends_all_that_wait(comfy: Comfy, gateway: Running) -> None:
    both = workflow(seed=33, **LONG)
    both["7"] = copy.deepcopy(both[VIDEO])
    both["7"]["inputs"]["seed"] = 34
    both["8"] = {"class_type": "PreviewAny", "inputs": {"source": ["7", 2]}}

    def stop(_: Run) -> bool:
        if len([video for video in videos(gateway) if video["seed"] in (33, 34)]) < 2:
            return False
        comfy.post("/interrupt", {})
        return True

    assert comfy.run(both, stop).end == "execution_interrupted"
    assert not [video for video in videos(gateway) if video["seed"] in (33, 34)]


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"num_frames": 35}, "num_frames must be a multiple of 17, got 35: 34 is the nearest."),
        ({"prompt": " "}, "prompt must say what happens in the video, got no text: write a sentence."),
        ({"url": "nowhere"}, "url must be the gateway's address such as http://127.0.0.1:8010, got 'nowhere'."),
    ],
)
def test_an_error_is_one_sentence_at_the_node(comfy: Comfy, more: dict[str, Any], sentence: str) -> None:
    run = comfy.run(workflow(**more))
    assert run.end == "execution_error"
    assert run.error == sentence
    assert run.of("execution_error")[0]["node_id"] == ("1" if "url" in more else VIDEO)


def test_an_unknown_preset_is_refused_before_the_run(comfy: Comfy) -> None:
    run = comfy.run(workflow(other_preset="nosuch"))
    assert run.error.startswith("QUALITY must be"), run.error
    assert "\n" not in run.error


def test_a_lost_gateway_is_an_error_and_never_a_frozen_comfyui(comfy: Comfy, start: Callable[[], Any]) -> None:
    with start() as lost:

        def kill(run: Run) -> bool:
            if not run.steps(VIDEO) or run.steps(VIDEO)[-1][0] < 1:
                return False
            lost.process.kill()
            return True

        run = comfy.run(workflow(lost.url, idle_timeout_s=5.0, seed=41, steps=300), kill)
    assert run.end == "execution_error"
    assert run.error.startswith(
        f"The gateway at {lost.url} has given no sign of life for 5 s: queue the workflow again"
    )
    assert comfy.run(workflow(seed=42)).end == "execution_success"


def test_a_quote_is_asked_anew_each_time(comfy: Comfy) -> None:
    cost = {name: SETTINGS[name] for name in ("width", "height", "num_frames", "steps", "guidance", "shift")}
    more = {"quality": "exact", "other_preset": "", "priority": "normal", "server": ["1", 0]}
    prompt = {
        "1": workflow()["1"],
        "2": {"class_type": "StepVideoQuote", "inputs": {**cost, **more}},
    }
    for _ in range(2):
        run = comfy.run(prompt)
        assert run.end == "execution_success", run.messages[-1]
        assert "2" not in run.of("execution_cached")[0]["nodes"]
        assert " of work, begins in about " in run.output("2")["text"][0]


EXAMPLES = ["image_to_video", "four_motion_scores", "draft_then_exact", "last_frame_to_next_clip"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_run(comfy: Comfy, root: Path, name: str) -> None:
    """As they are, but for the sizes and steps of the toy world, and with what is muted switched on."""
    saved_workflow = json.loads((root / "comfyui" / "example_workflows" / f"{name}.json").read_text(encoding="utf-8"))
    for node in saved_workflow["nodes"]:
        node["mode"] = 0
    prompt = prompt_of(saved_workflow, comfy.get("/object_info"))
    small = {name: SETTINGS[name] for name in ("width", "height", "num_frames", "steps", "guidance")}
    for node in prompt.values():
        if node["class_type"] == "StepVideoImageToVideo":
            node["inputs"] |= small
    run = comfy.run(prompt)
    assert run.end == "execution_success", run.messages[-1]
    makers = [node for node, one in prompt.items() if one["class_type"] == "StepVideoImageToVideo"]
    assert all(run.steps(node) for node in makers)
    outputs = [node for node, one in prompt.items() if one["class_type"] == "SaveVideo"]
    assert outputs
    for node in outputs:
        assert len(decode_mp4(saved(comfy, run, node))[0]) % 34 == 0


def test_the_examples_are_in_the_browser_of_templates(comfy: Comfy) -> None:
    assert sorted(comfy.get("/api/workflow_templates")["step-video"]) == sorted(EXAMPLES)

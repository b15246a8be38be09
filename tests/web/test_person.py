"""The page as a person uses it: a video is asked for, watched, kept, asked for again, compared."""

import base64
import json
import re
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import FilePayload, Locator, Page, expect

from stepvideo_gateway import media
from tests.web.conftest import PROMPT, Open, Site, film, holds, patiently
from toyworld.first_image import centred_scene
from toyworld.samples import first_image, png

# OpenAI has ended its own service; the format lives on.
pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")

FRAME_S = 1 / 25


def dropped(page: Page, name: str, kind: str, content: bytes) -> None:
    """A file that falls on the page."""
    data = page.evaluate_handle(
        """([name, type, bytes]) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], name, { type }));
            return data;
        }""",
        [name, kind, list(content)],
    )
    page.dispatch_event(".drop", "drop", {"dataTransfer": data})


def tiles(page: Page) -> Locator:
    return page.locator(".tile")


def open_first(page: Page) -> Locator:
    tiles(page).first.locator(".open").click()
    dialog = page.locator("dialog.detail")
    expect(dialog).to_be_visible()
    return dialog


def settings(site: Site, index: int = 0) -> dict[str, Any]:
    """Of the newest videos, as the API has them."""
    video = site.client().videos.list(limit=100).data[index].model_dump()
    return {**video["settings"], "prompt": video["prompt"], "seed": video["seed"]}


def test_the_form_begins_with_what_works_here_and_a_video_is_made(site: Site, opened: Open, album: Path) -> None:
    page = opened(site)
    expect(page.get_by_label("What happens")).to_have_value(PROMPT)
    expect(page.locator(".framed img")).to_be_visible()
    expect(page.locator(".gallery .empty")).to_contain_text("No videos yet")
    page.screenshot(path=album / "first.png")
    page.get_by_label("Seed", exact=True).fill("7")
    page.get_by_role("button", name="Make the video").click()
    work = page.locator(".work")
    expect(work.locator(".state")).to_have_text(re.compile(r"Step \d+ of 20"))
    page.screenshot(path=album / "running.png")
    expect(tiles(page)).to_have_count(1)
    expect(work).to_have_count(0)
    asked = settings(site)
    assert (asked["prompt"], asked["seed"], asked["size"], asked["num_frames"]) == (PROMPT, 7, "64x64", 34)
    expect(page.locator(".quote")).to_contain_text(re.compile(r"About .* · begins at once"))
    dialog = open_first(page)
    expect(dialog.locator("video")).to_be_visible()
    holds(page, "document.querySelector('dialog video').currentTime > 0.2")
    page.screenshot(path=album / "detail.png")


def test_a_picture_is_dropped_pasted_chosen_and_taken_and_its_crop_is_drawn(site: Site, opened: Open) -> None:
    page = opened(site)
    expect(page.locator(".framed img")).to_be_visible()
    dropped(page, "wide.png", "image/png", film((300, 100)))
    expect(page.locator(".picture > .hint")).to_have_text("The model sees the bright part, as 64 × 64.")
    crop, image = page.locator(".crop").bounding_box(), page.locator(".framed img").bounding_box()
    assert crop is not None
    assert image is not None
    assert abs(crop["width"] - image["width"] / 3) < 2, "a square in the middle of a picture of 3:1"
    assert abs(crop["x"] - image["x"] - image["width"] / 3) < 2
    page.get_by_role("radio", name="As picture").check()
    expect(page.locator(".picture > .hint")).to_contain_text("The model sees")
    page.get_by_role("button", name="Remove").click()
    expect(page.locator(".drop-empty")).to_be_visible()
    page.locator("input[type=file]").set_input_files(FilePayload(name="a.txt", mimeType="text/plain", buffer=b"x"))
    expect(page.locator(".picture .wrong")).to_contain_text("PNG, JPEG or WebP")
    page.locator("input[type=file]").set_input_files(
        FilePayload(name="a.png", mimeType="image/png", buffer=film((80, 80)))
    )
    expect(page.locator(".picture .wrong")).to_be_hidden()
    natural = "document.querySelector('.framed img').naturalWidth"
    holds(page, f"{natural} === 80")
    page.evaluate(
        """(bytes) => {
            const clipboardData = new DataTransfer();
            clipboardData.items.add(new File([new Uint8Array(bytes)], 'p.png', { type: 'image/png' }));
            document.dispatchEvent(new ClipboardEvent('paste', { clipboardData }));
        }""",
        list(film((120, 80))),
    )
    holds(page, f"{natural} === 120")
    page.context.grant_permissions(["camera"])
    page.locator(".tools").get_by_role("button", name="use the camera").click()
    holds(page, "document.querySelector('dialog.shot video')?.videoWidth > 0")
    page.get_by_role("button", name="Take the picture").click()
    holds(page, f"{natural} > 120")


def test_a_run_is_seen_and_stopped(site: Site, opened: Open) -> None:
    video = site.make(wait=False, num_inference_steps=200)
    page = opened(site)
    work = page.locator(".work")
    expect(work.locator(".state")).to_have_text(re.compile(r"Step ([3-9]|\d\d) of 200"))
    expect(work.locator(".rest")).to_have_text(re.compile(r"about .* left"))
    assert " % · " in page.title()
    work.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Let it run").click()
    expect(work).to_have_count(1)
    work.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Stop it").click()
    expect(work).to_have_count(0)
    assert video.id not in [left.id for left in site.client().videos.list().data]


def test_the_preview_moves_and_goes_on(site: Site, opened: Open, album: Path) -> None:
    """It is the server's small picture of all frames, and a newer one takes its place."""
    for shape, colour, prompt in (
        ("square", "green", "绿色方块向上移动。"),
        ("circle", "blue", "A blue circle moves left."),
        ("triangle", "yellow", "黄色三角形向下移动。"),
    ):
        scene = png(first_image(centred_scene(shape, colour, 4)))
        site.make(prompt, picture=scene, num_frames=34, num_inference_steps=20, motion_score=10)
    page = opened(site)
    page.get_by_text("Fine control").click()
    page.get_by_label("Steps", exact=True).fill("120")
    page.get_by_text("Fine control").click()
    page.get_by_role("button", name="Make the video").click()
    preview = page.locator(".work .screen img:not(.first)")
    expect(preview).to_be_visible()
    expect(preview).to_have_attribute("data-kind", "image/webp")
    first, source = preview.get_attribute("data-step"), preview.get_attribute("src")
    holds(page, f"document.querySelector('.work .screen img:not(.first)').dataset.step > {first}")
    assert preview.get_attribute("src") != source
    assert page.evaluate("document.querySelector('.work .screen img:not(.first)').naturalWidth") > 0
    [running] = [video for video in site.client().videos.list().data if video.status == "in_progress"]
    with urllib.request.urlopen(f"{site.url}/v1/videos/{running.id}/events") as events:
        data = next(line for line in events if line.startswith(b"data: ") and b"media_type" in line)
    content = base64.b64decode(json.loads(data[len(b"data: ") :])["data"])
    assert b"ANIM" in content[:64], "it moves"
    holds(page, "document.querySelector('.work .screen img:not(.first)').dataset.step > 60")
    page.evaluate("document.querySelector('.compose').scrollTop = 0; scrollTo(0, 0)")
    page.screenshot(path=album / "page.png")
    site.empty()


def test_those_that_wait_know_their_place(site: Site, opened: Open) -> None:
    for _ in range(3):
        site.make(wait=False, num_inference_steps=200)
    page = opened(site)
    states = page.locator(".work .state")
    expect(states).to_have_count(3)
    expect(states.nth(0)).to_contain_text("Step")
    expect(states.nth(1)).to_contain_text(re.compile("Next in line|first"))
    expect(states.nth(2)).to_contain_text("2 of your videos go first")
    site.empty()
    expect(states).to_have_count(0)


def test_a_finished_file_gives_its_settings_back(site: Site, opened: Open) -> None:
    made: dict[str, Any] = {
        "guidance_scale": 3.5,
        "motion_score": 10,
        "num_inference_steps": 3,
        "seed": 11,
        "camera": "pan-left",
    }
    site.make(prompt="蓝色方块", **made)
    page = opened(site)
    expect(tiles(page)).to_have_count(1)
    dialog = open_first(page)
    with page.expect_download() as download:
        dialog.get_by_role("button", name="Download").click()
    content = Path(download.value.path()).read_bytes()
    assert b"AI-generated" in content
    page.keyboard.press("Escape")
    dropped(page, "finished.mp4", "video/mp4", content)
    expect(page.get_by_label("What happens")).to_have_value("蓝色方块")
    expect(page.locator(".disclosure .now").first).to_have_text("Move left")
    expect(page.get_by_label("Seed", exact=True)).to_have_value("11")
    holds(page, "document.querySelector('.framed img').naturalWidth === 64")
    page.get_by_role("button", name="Make the video").click()
    expect(tiles(page)).to_have_count(2)
    assert settings(site, 0) == settings(site, 1), "the same request again"
    dropped(page, "other.mp4", "video/mp4", b"\0\0\0\x08ftyp")
    expect(page.locator(".message.bad")).to_contain_text("no settings in it")


def test_a_video_leads_to_others(site: Site, opened: Open, tmp_path: Path) -> None:
    first = site.make(quality="exact", seed=5)
    page = opened(site)
    expect(tiles(page)).to_have_count(1)
    dialog = open_first(page)
    dialog.get_by_role("button", name="Make it in full quality").click()
    expect(tiles(page)).to_have_count(2)
    full = settings(site)
    assert (full["seed"], full["num_inference_steps"], full["quality"]) == (5, 20, "exact")
    page.locator(f'.tile[data-id="{first.id}"] .open').click()
    page.get_by_role("button", name="Use this seed").click()
    expect(page.get_by_label("Seed", exact=True)).to_have_value("5")
    page.locator(f'.tile[data-id="{first.id}"] .open').click()
    page.get_by_role("button", name="Same settings, other prompt").click()
    expect(page.get_by_label("What happens")).to_be_focused()
    page.keyboard.type("红色圆形向左移动。")
    page.get_by_role("button", name="Make the video").click()
    expect(tiles(page)).to_have_count(3)
    same = settings(site)
    assert (same["prompt"], same["seed"], same["num_inference_steps"]) == ("红色圆形向左移动。", 5, 2)
    page.locator(f'.tile[data-id="{first.id}"] .open').click()
    page.get_by_role("button", name="Continue from the last frame").click()
    expect(page.get_by_label("What happens")).to_have_value("")
    page.get_by_label("What happens").fill(PROMPT)
    page.get_by_role("button", name="Make the video").click()
    expect(tiles(page)).to_have_count(4)
    newest = site.client().videos.list(limit=1).data[0].id
    before = tmp_path / "before.mp4"
    before.write_bytes(site.client().videos.download_content(first.id).read())
    with urllib.request.urlopen(f"{site.url}/v1/videos/{newest}/content?variant=input") as after:
        assert after.read() == media.last_frame(before), "the very last frame, without a loss"


def test_several_seeds_at_once(site: Site, opened: Open) -> None:
    page = opened(site)
    page.get_by_text("Fine control").click()
    page.get_by_label("Steps", exact=True).fill("2")
    page.get_by_label("Seed", exact=True).fill("40")
    page.get_by_role("radio", name="4", exact=True).check()
    page.get_by_role("button", name="Make 4 videos").click()
    expect(tiles(page)).to_have_count(4)
    assert sorted(settings(site, index)["seed"] for index in range(4)) == [40, 41, 42, 43]
    page.get_by_label("Search prompts and seeds").fill("42")
    expect(tiles(page)).to_have_count(1)
    page.get_by_label("Search prompts and seeds").fill("nothing such")
    expect(page.locator(".empty")).to_contain_text("Nothing matches")
    page.get_by_role("button", name="Show all").click()
    expect(tiles(page)).to_have_count(4)
    dialog = open_first(page)
    dialog.get_by_role("button", name="Delete").click()
    dialog.get_by_role("button", name="Delete").click()
    expect(tiles(page)).to_have_count(3)
    assert len(site.client().videos.list().data) == 3


def test_two_results_are_compared_in_step(site: Site, opened: Open, album: Path) -> None:
    site.make(prompt="红色圆形向左移动。", num_frames=34, seed=1, num_inference_steps=12)
    site.make(num_frames=34, seed=2, num_inference_steps=12)
    page = opened(site)
    expect(tiles(page)).to_have_count(2)
    for index in range(2):
        tiles(page).nth(index).get_by_label("Compare").check()
    page.screenshot(path=album / "gallery.png")
    page.get_by_role("button", name="Compare these two").click()
    dialog = page.locator("dialog.compare")
    names = dialog.locator("tbody th").all_inner_texts()
    assert names == ["Prompt", "Seed"], "what is the same is not shown"
    times = "[...document.querySelectorAll('dialog video')].map((video) => video.currentTime)"
    holds(page, f"{times}.every((time) => time > 0)")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    patiently(lambda: abs(page.evaluate(times)[0] - 3.5 * FRAME_S) < 0.001, "the fourth frame", page)
    assert page.evaluate(times)[0] == page.evaluate(times)[1]
    dialog.get_by_role("button", name="Play").click()
    holds(page, f"{times}[0] > 0.6")
    dialog.get_by_role("button", name="Pause").click()
    patiently(lambda: len(set(page.evaluate(times))) == 1, "both to stand at the same frame", page)
    page.screenshot(path=album / "compare.png")


def test_a_quote_says_what_each_preset_takes_and_what_does_not_fit(site: Site, opened: Open) -> None:
    for quality in ("exact", "balanced", "fast"):
        site.make(quality=quality, num_inference_steps=20)
    page = opened(site)
    costs = page.locator(".presets .cost")
    expect(costs).to_have_count(3)
    for index in range(3):
        expect(costs.nth(index)).to_contain_text("About")
    page.get_by_text("Fine control").click()
    page.get_by_label("Steps", exact=True).fill("100000")
    expect(page.locator(".trio .wrong").first).to_contain_text("STEPS must be")
    page.get_by_label("Steps", exact=True).fill("")
    expect(page.locator(".trio .wrong").first).to_be_hidden()
    expect(page.locator(".quote")).to_contain_text("About")


def test_a_failed_video_says_why_and_what_to_do(site: Site, opened: Open) -> None:
    """The gateway lets this prompt through; the server refuses its length."""
    site.make(prompt="很" * 700)
    page = opened(site)
    expect(page.locator(".tile.failed .facts")).to_have_text("The server refused the request.")
    dialog = open_first(page)
    expect(dialog.locator(".message")).to_contain_text("Correct it as described")
    expect(dialog.locator(".message")).to_contain_text("320")


def test_what_the_page_reads_is_what_the_api_says(site: Site) -> None:
    video = site.make(seed=3, guidance_scale=4.5, negative_prompt="blur").model_dump()
    expected = {"size": "64x64", "num_frames": 17, "num_inference_steps": 2, "guidance_scale": 4.5}
    assert video["settings"] == {**expected, "seed": 3, "negative_prompt": "blur"}
    assert video["took_s"] > 0
    assert json.dumps(video["warnings"]).count("card"), "17 frames are not what the card states"

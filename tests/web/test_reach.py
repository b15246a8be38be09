"""Whom the page reaches, and what it survives: languages, screens, keyboards, axe-core, lost gateways, two tabs."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import axe_playwright_python
import pytest
from playwright.sync_api import Page, expect

from tests.gateway.conftest import environment
from tests.web.conftest import PROMPT, Open, Site, film, holds

# OpenAI has ended its own service; the format lives on.
pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")

GRAVE = ("serious", "critical")
LOST = ("Failed to load resource", "net::ERR", "status of 40", "status of 50")


def faults(page: Page) -> list[str]:
    """What axe-core finds that is serious."""
    page.evaluate("""() => Promise.all(document.getAnimations().filter((a) => a.effect.getTiming().iterations < 9)
        .map((animation) => animation.finished))""")
    if not page.evaluate("'axe' in window"):
        # Through the protocol, so that the page's own policy stays as it is.
        page.evaluate((Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8"))
    found = page.evaluate("axe.run()")
    return [
        f"{each['impact']}: {each['id']}: {node['html'][:160]} {node['failureSummary'][:200]}"
        for each in found["violations"]
        if each["impact"] in GRAVE
        for node in each["nodes"]
    ]


def no_wider_than(page: Page) -> None:
    """Nothing has to be scrolled sideways."""
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), page.evaluate(
        "[...document.querySelectorAll('*')].filter((e) => e.getBoundingClientRect().right > innerWidth + 1)"
        ".map((e) => e.className || e.tagName).slice(0, 8)"
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("language", ["en-GB", "zh-CN"])
def test_axe_finds_nothing_serious(site: Site, opened: Open, album: Path, language: str, scheme: str) -> None:
    for seed in (1, 2):
        site.make(seed=seed)
    site.make(wait=False, num_inference_steps=200)
    page = opened(site, language=language, color_scheme=scheme)
    expect(page.locator(".tile")).to_have_count(2)
    expect(page.locator(".work")).to_have_count(1)
    page.screenshot(path=album / f"{scheme}-{language}.png")
    for drawer in page.locator("summary").all():
        drawer.click()
    assert faults(page) == []
    page.locator(".tile .open").first.click()
    expect(page.locator("dialog video")).to_be_visible()
    assert faults(page) == []
    page.keyboard.press("Escape")
    for tile in page.locator(".tile").all():
        tile.locator("input").check()
    page.locator(".tray .main").click()
    expect(page.locator("dialog.compare")).to_be_visible()
    assert faults(page) == []
    site.empty()
    page.keyboard.press("Escape")
    expect(page.locator(".empty")).to_be_visible()
    assert faults(page) == []


def test_both_languages_say_the_same_things(site: Site, opened: Open) -> None:
    page = opened(site)
    shapes = page.evaluate(
        """async () => {
            const at = document.querySelector('script[type=module]').src.replace('main.js', '');
            const shape = (value, path) => typeof value === 'string'
                ? [`${path} ${[...value.matchAll(/\\{\\w+\\}/g)].map(String).sort()}`]
                : Object.entries(value).flatMap(([name, part]) => shape(part, `${path}.${name}`));
            const words = async (name) => (await import(`${at}words-${name}.js`)).default;
            return Promise.all(['en', 'zh'].map(async (name) => shape(await words(name), '')));
        }"""
    )
    assert len(shapes[0]) > 200
    assert shapes[0] == shapes[1], "the same keys, with the same places to fill in"


def test_the_language_changes_and_nothing_is_lost(site: Site, opened: Open, album: Path) -> None:
    site.make(seed=1)
    page = opened(site, language="zh-CN")
    expect(page.get_by_role("heading", name="新视频")).to_be_visible()
    expect(page.locator(".tile .facts")).to_contain_text("0.7 秒")
    page.get_by_label("发生什么").fill("一只猫在窗台上伸懒腰。")
    page.screenshot(path=album / "chinese.png")
    page.get_by_role("button", name="切换到英文").click()
    expect(page.get_by_role("heading", name="New video")).to_be_visible()
    assert page.evaluate("document.documentElement.lang") == "en"
    assert page.evaluate("document.activeElement.dataset.role") == "language", "the focus stays"
    expect(page.get_by_label("What happens")).to_have_value("一只猫在窗台上伸懒腰。")
    page.reload()
    expect(page.get_by_role("heading", name="New video")).to_be_visible()


def test_a_reload_loses_nothing(site: Site, opened: Open) -> None:
    page = opened(site)
    expect(page.locator(".framed img")).to_be_visible()
    page.locator("input[type=file]").set_input_files(
        {"name": "a.png", "mimeType": "image/png", "buffer": film((123, 77))}
    )
    page.get_by_label("What happens").fill("a cat")
    page.locator("summary").first.click()
    page.get_by_role("radio", name="Orbit").check()
    page.get_by_label("Seed", exact=True).fill("99")
    page.locator(".motion-dot").wait_for()
    page.reload()
    expect(page.get_by_label("What happens")).to_have_value("a cat")
    expect(page.locator(".disclosure .now").first).to_have_text("Orbit")
    expect(page.get_by_label("Seed", exact=True)).to_have_value("99")
    holds(page, "document.querySelector('.framed img').naturalWidth === 123")


def test_360_pixels_are_enough(site: Site, opened: Open, album: Path) -> None:
    for seed in (1, 2):
        site.make(seed=seed, prompt=f"{PROMPT} {'a long prompt with many words ' * seed * 3}")
    site.make(wait=False, num_inference_steps=200)
    page = opened(site, width=360, height=740, has_touch=True, is_mobile=True)
    expect(page.locator(".tile")).to_have_count(2)
    for drawer in page.locator("summary").all():
        drawer.click()
    no_wider_than(page)
    page.screenshot(path=album / "narrow.png")
    page.locator(".running").scroll_into_view_if_needed()
    page.screenshot(path=album / "narrow-videos.png")
    page.locator(".tile .open").first.click()
    expect(page.locator("dialog video")).to_be_visible()
    no_wider_than(page)
    page.screenshot(path=album / "narrow-detail.png")
    page.keyboard.press("Escape")
    for tile in page.locator(".tile").all():
        tile.locator("input").check()
    page.locator(".tray .main").click()
    expect(page.locator("dialog.compare")).to_be_visible()
    no_wider_than(page)
    site.empty()


def test_the_keyboard_alone_is_enough(site: Site, opened: Open) -> None:
    page = opened(site)
    expect(page.locator(".framed img")).to_be_visible()

    def tab_to(condition: str) -> None:
        for _ in range(120):
            page.keyboard.press("Tab")
            if page.evaluate(f"((element) => {condition})(document.activeElement)"):
                outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                around = page.evaluate(
                    "getComputedStyle(document.activeElement.nextElementSibling ?? document.body).outlineStyle"
                )
                assert outline != "none" or around != "none", "the focus is seen"
                return
        raise AssertionError(condition)

    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className").endswith("skip")
    tab_to("element.tagName === 'TEXTAREA'")
    page.keyboard.press("Control+a")
    page.keyboard.type("a red circle")
    tab_to("element.tagName === 'SUMMARY'")
    page.keyboard.press("Enter")
    tab_to("element.name === 'camera'")
    page.keyboard.press("ArrowRight")
    expect(page.locator(".disclosure .now").first).to_have_text("Fixed")
    tab_to("element.type === 'submit'")
    page.keyboard.press("Enter")
    expect(page.locator(".tile")).to_have_count(1)
    video = site.client().videos.list().data[0]
    assert video.prompt == "a red circle，固定镜头。"
    page.get_by_label("What happens").focus()
    tab_to("element.classList.contains('open')")
    page.keyboard.press("Enter")
    expect(page.locator("dialog.detail")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("dialog.detail")).to_have_count(0)
    assert page.evaluate("document.activeElement.className") == "open", "back where it was"
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    expect(page.locator(".tile.picked")).to_have_count(1)


def test_a_gateway_that_is_killed_and_comes_back(sites: Callable[..., Site], opened: Open, album: Path) -> None:
    site = sites()
    site.start()
    page = opened(site, expected=LOST)
    site.make(wait=False, num_inference_steps=60, num_frames=34)
    # The page looks now; while nothing runs it does so every six seconds, in which a fast machine makes the video.
    page.evaluate("dispatchEvent(new Event('online'))")
    expect(page.locator(".work .state")).to_contain_text("Step")
    site.kill()
    expect(page.locator(".banner")).to_contain_text("The gateway does not answer")
    page.get_by_label("What happens").fill("something new")
    page.get_by_role("button", name="Make the video").click()
    expect(page.locator(".message.bad")).to_contain_text("Look at your connection")
    page.screenshot(path=album / "away.png")
    site.start()
    expect(page.locator(".banner")).to_be_hidden()
    expect(page.locator(".tile")).to_have_count(1)
    expect(page.get_by_label("What happens")).to_have_value("something new")
    assert [video.status for video in site.client().videos.list().data] == ["completed"]


def test_two_tabs_show_the_same(site: Site, opened: Open) -> None:
    first = opened(site)
    second = first.context.new_page()
    second.goto(site.url)
    expect(second.locator(".framed img")).to_be_visible()
    first.get_by_text("Fine control").click()
    first.get_by_label("Steps", exact=True).fill("2")
    first.get_by_role("button", name="Make the video").click()
    expect(second.locator(".tile")).to_have_count(1)
    second.locator(".tile .open").click()
    second.get_by_role("button", name="Delete").click()
    second.locator("dialog").get_by_role("button", name="Delete").click()
    expect(first.locator(".tile")).to_have_count(0)
    expect(first.locator(".empty")).to_be_visible()


def test_a_gateway_with_keys_asks_for_one(sites: Callable[..., Site], opened: Open, root: Path, album: Path) -> None:
    site = sites(require_key=True)
    site.start()
    line = site.line("keys", "add", "ada", "--presets", "exact,fast")
    done = subprocess.run(line, cwd=root, env=environment(root), capture_output=True, text=True, check=True)
    site.key = done.stdout.strip()
    page = opened(site, expected=("status of 401", "status of 403"))
    dialog = page.locator("dialog.key")
    expect(dialog).to_be_visible()
    page.screenshot(path=album / "key.png")
    assert faults(page) == []
    dialog.get_by_label("API key").fill("sk-stepvideo-wrong")
    dialog.get_by_role("button", name="Continue").click()
    expect(dialog.locator(".wrong")).to_contain_text("not known here")
    dialog.get_by_label("API key").fill(site.key)
    dialog.get_by_role("button", name="Continue").click()
    expect(page.locator(".framed img")).to_be_visible()
    site.make()
    expect(page.locator(".tile img")).to_be_visible()
    page.reload()
    expect(page.locator(".tile img")).to_be_visible()
    page.get_by_role("radio", name="Balanced").check()
    page.get_by_role("button", name="Make the video").click()
    expect(page.locator(".message.bad")).to_contain_text("Your key does not allow that.")
    page.get_by_role("button", name="API key").click()
    page.get_by_role("button", name="Forget the key").click()
    expect(page.locator("dialog.key")).to_be_visible()


def test_without_a_ready_server_the_page_says_so(sites: Callable[..., Site], opened: Open) -> None:
    site = sites()
    site.server = "127.0.0.1:9"
    site.start(ready=False)
    page = opened(site, expected=LOST)
    expect(page.locator(".banner")).to_contain_text("No server is ready yet")
    expect(page.locator(".quote")).to_contain_text("No estimate while no server is ready")
    page.locator("input[type=file]").set_input_files(
        {"name": "a.png", "mimeType": "image/png", "buffer": film((64, 64))}
    )
    page.get_by_label("What happens").fill("a cat")
    page.get_by_role("button", name="Make the video").click()
    expect(page.locator(".message.bad")).to_contain_text(re.compile("cannot do that just now"))
    expect(page.locator(".banner")).to_be_visible()

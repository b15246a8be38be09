"""The page's main path in Debian's Firefox: a picture and a sentence become a video, which plays."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.web.conftest import PROMPT, Site
from tests.web.firefox import Firefox, firefox

PROGRAMS = ("firefox-esr", "firefox")

# Chromium is what CI has. OpenAI has ended its own service; the format lives on.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")]


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Firefox]:
    program = next((path for name in PROGRAMS if (path := shutil.which(name))), None)
    if program is None:
        pytest.fail("needs Firefox: apt-get install firefox-esr")
    with firefox(program, tmp_path) as found:
        yield found


def button(name: str) -> str:
    return f"[...document.querySelectorAll('button')].find((one) => one.textContent.trim() === '{name}')"


def test_a_video_is_asked_for_watched_played_and_compared(
    browser: Firefox, site: Site, picture: bytes, tmp_path: Path, album: Path
) -> None:
    browser.go(site.url)
    browser.until("document.querySelector('.framed img')?.naturalWidth > 0")
    assert browser.evaluate("document.querySelector('textarea').value") == PROMPT
    assert "No videos yet" in browser.until("document.querySelector('.gallery .empty')?.textContent")
    browser.screenshot(album / "firefox-first.png")

    chosen = tmp_path / "chosen.png"
    chosen.write_bytes(picture)
    browser.choose_file("input[type=file]", chosen)
    browser.click("document.querySelector('textarea')")
    browser.evaluate("document.querySelector('textarea').select()")
    browser.type("a red circle moves right")
    browser.click(button("Make the video"))
    assert "Step" in browser.until(
        "(document.querySelector('.work .state')?.textContent.match(/Step [0-9]+ of 20/) ?? [''])[0]"
    )
    browser.until("document.querySelector('.work img')?.naturalWidth > 0")
    browser.screenshot(album / "firefox-running.png")
    browser.until("document.querySelectorAll('.tile').length === 1 && !document.querySelector('.work')")
    [video] = site.client().videos.list().data
    assert video.prompt == "a red circle moves right"

    browser.click("document.querySelector('.tile .open')")
    browser.until("document.querySelector('dialog.detail video')?.currentTime > 0.2")
    browser.screenshot(album / "firefox-detail.png")
    browser.type("\ue00c")  # Escape
    browser.until("!document.querySelector('dialog')")

    site.make(seed=2)
    browser.until("document.querySelectorAll('.tile').length === 2")
    for index in (0, 1):
        browser.click(f"document.querySelectorAll('.tile input')[{index}]")
    browser.click("document.querySelector('.tray .main')")
    browser.until("[...document.querySelectorAll('dialog.compare video')].filter((v) => v.readyState > 1).length === 2")
    browser.screenshot(album / "firefox-compare.png")

    assert not browser.said
    assert all(url.startswith((site.url, "data:", "blob:", "about:")) for url in browser.asked), browser.asked

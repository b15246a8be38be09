"""The files of the page: how they are sent, how large they are, what they may load."""

import gzip
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from email.message import Message
from pathlib import Path

import pytest
from playwright.sync_api import expect

from stepvideo_gateway.errors import ConfigError
from stepvideo_gateway.pages import Example, Pages
from tests.web.conftest import PROMPT, Open, Site

# OpenAI has ended its own service; the format lives on.
pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")

MAX_BYTES = 200_000
MAX_LINES = 300


@pytest.fixture(scope="session")
def web(root: Path) -> Path:
    return root / "gateway" / "stepvideo_gateway" / "web"


def fetch(url: str, headers: Mapping[str, str] | None = None) -> tuple[int, Message, bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=dict(headers or {}))) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def test_the_page_is_small_and_paints_soon(site: Site, opened: Open, capsys: pytest.CaptureFixture[str]) -> None:
    page = opened(site)
    expect(page.locator(".empty")).to_be_visible()
    loaded = page.evaluate(
        """() => [...performance.getEntriesByType('navigation'), ...performance.getEntriesByType('resource')]
            .filter((entry) => entry.name.includes('/web/') || entry.entryType === 'navigation')
            .map((entry) => [entry.name, entry.decodedBodySize, entry.encodedBodySize])"""
    )
    paint_ms = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    whole, sent = (sum(entry[column] for entry in loaded) for column in (1, 2))
    with capsys.disabled():
        print(f"\npage: {len(loaded)} files, {whole} bytes, {sent} sent; first paint after {paint_ms:.0f} ms")
    assert len(loaded) > 15
    assert 0 < sent <= whole < MAX_BYTES


def test_files_are_kept_for_ever_and_the_page_is_asked_for_again(site: Site) -> None:
    status, headers, index = fetch(f"{site.url}/")
    assert (status, headers["cache-control"]) == (200, "no-cache")
    assert fetch(f"{site.url}/", {"if-none-match": headers["etag"]})[0] == 304
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    names = re.findall(r'(?:src|href)="(web/[^"]+)"', index.decode())
    assert len(names) > 15
    for name in names:
        status, headers, content = fetch(f"{site.url}/{name}")
        assert status == 200, name
        assert "immutable" in headers["cache-control"]
        assert headers["x-content-type-options"] == "nosniff"
        again, _, nothing = fetch(f"{site.url}/{name}", {"if-none-match": headers["etag"]})
        assert (again, nothing) == (304, b"")
        _, packed, body = fetch(f"{site.url}/{name}", {"accept-encoding": "gzip"})
        assert packed["content-encoding"] == "gzip"
        assert gzip.decompress(body) == content
    assert fetch(f"{site.url}/web/0000000000000000/main.js")[0] == 404, "files of another gateway's page"
    for way in ("..%2f..%2fpages.py", "index.html", "__init__.py"):
        assert fetch(f"{site.url}/{names[0].rpartition('/')[0]}/{way}")[0] == 404


def test_every_module_is_loaded_at_once(web: Path) -> None:
    index = (web / "index.html").read_text(encoding="utf-8")
    modules = {path.name for path in web.glob("*.js")}
    assert set(re.findall(r"ASSETS/(\w[\w-]*\.js)", index)) == modules
    imported = {
        name for path in web.glob("*.js") for name in re.findall(r"from '\./(.+?)'", path.read_text(encoding="utf-8"))
    }
    assert imported == modules - {"main.js"}, "no module without use"


def test_modules_are_short_and_ask_nobody_else(web: Path) -> None:
    paths = [path for path in web.iterdir() if path.suffix in (".js", ".css", ".html", ".svg")]
    assert len(paths) > 20
    for path in paths:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= MAX_LINES, path
        addresses = set(re.findall(r"(?:https?:)?//[\w.]+\.\w+[^\s'\")]*", re.sub(r"^\s*//.*$", "", text, flags=re.M)))
        assert addresses <= {"http://www.w3.org/2000/svg"}, path
        for danger in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
            assert danger not in text, path


def test_the_example_is_a_picture(tmp_path: Path) -> None:
    text = tmp_path / "example.txt"
    text.write_text("no picture", encoding="utf-8")
    for path in (text, tmp_path / "none.png"):
        with pytest.raises(ConfigError, match="--example needs a PNG, JPEG or WebP file"):
            Example(path, PROMPT).check()


def test_two_contents_have_two_addresses(web: Path, tmp_path: Path) -> None:
    for path in web.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = Pages(folder=tmp_path)
    assert before.digest == Pages(folder=web).digest
    (tmp_path / "main.js").write_text("changed", encoding="utf-8")
    assert Pages(folder=tmp_path).digest != before.digest

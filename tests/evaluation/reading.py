"""The command line called in this process, and what it left: one sentence of an error, the tags of a page."""

import re
from html.parser import HTMLParser

import pytest

from stepvideo_client.cli import main


def run(*arguments: object) -> int:
    """`stepvideo ARGUMENTS`: the exit code."""
    return main([str(argument) for argument in arguments])


def one_sentence(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert re.match(r"stepvideo: [A-Z_]+: ", lines[0])
    assert "Traceback" not in lines[0]
    return lines[0]


class Tags(HTMLParser):
    """Every tag with its attributes, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

"""docs/licences.md says what the distributions depend on, and every package in this environment has a licence."""

import re
from email.message import Message
from pathlib import Path

import pytest

from release.licences import DOCUMENT, NOT_SHIPPED, brought_by, document, licence_of, main, named_by


def test_the_document_is_up_to_date(root: Path) -> None:
    assert (root / DOCUMENT).read_text(encoding="utf-8") == document(root), "make licences"
    assert main(["--check"], root) == 0


def test_a_dependency_more_makes_it_stale(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (".", "client", "gateway", "docs"):
        (tmp_path / folder).mkdir(exist_ok=True)
    for name in ("pyproject.toml", "client/pyproject.toml", "gateway/pyproject.toml", DOCUMENT):
        text = (root / name).read_text(encoding="utf-8")
        (tmp_path / name).write_text(text.replace('"pillow==', '"pytest==1",\n    "pillow=='), encoding="utf-8")
    assert main(["--check"], tmp_path) == 1
    assert "it is stale: run `make licences`" in capsys.readouterr().err
    assert main([], tmp_path) == 0
    assert "| stepvideo-gateway |  | pytest | 1 | MIT |" in (tmp_path / DOCUMENT).read_text(encoding="utf-8")


def test_every_pin_has_a_row(root: Path) -> None:
    text = (root / "pyproject.toml").read_text(encoding="utf-8")
    shipped = text.partition("[dependency-groups]")[0].partition("\ndev = [")[0]
    pins = set(re.findall(r'^    "([\w-]+)(?:\[[\w,]+\])?==', shipped, re.MULTILINE))
    named = {requirement.name for distribution, _, requirement in named_by(root) if distribution == "stepvideo-serve"}
    assert named == pins
    assert not {extra for _, extra, _ in named_by(root)} & set(NOT_SHIPPED)


def test_everything_that_is_installed_states_its_licence(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = brought_by(requirement for _, _, requirement in named_by(root))
    names = {package.partition(" ")[0] for package in found}
    assert {"torch", "sympy", "grpcio", "starlette", "greenlet"} <= names, "what dependencies bring is there too"
    assert "pytest" not in names
    assert main(["--all"], root) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(found)


@pytest.mark.parametrize(
    ("fields", "licence"),
    [
        ([("License-Expression", "MIT"), ("License", "other")], "MIT"),
        ([("License", "Apache 2.0"), ("Classifier", "License :: OSI Approved :: X")], "Apache 2.0"),
        (
            [("License", "Copyright\nall of it"), ("Classifier", "License :: OSI Approved :: BSD License")],
            "BSD License",
        ),
        ([("License", "UNKNOWN"), ("Classifier", "Topic :: Video")], None),
    ],
)
def test_what_metadata_say(fields: list[tuple[str, str]], licence: str | None) -> None:
    message = Message()
    for name, value in fields:
        message[name] = value
    assert licence_of(message) == licence

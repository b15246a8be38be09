"""docs/evaluation.md says what `stepvideo metrics` and `compare` take and tell."""

import argparse
import re
from dataclasses import fields
from pathlib import Path

import pytest

from stepvideo_client.evaluation.clip_measures import ClipMeasures
from stepvideo_client.evaluation.commands import load
from stepvideo_client.evaluation.comparison import FIGURES
from tests.test_documents import section


@pytest.mark.parametrize(
    ("command", "title"), [("metrics", "Measuring the clips"), ("compare", "Comparing two folders")]
)
def test_every_option_is_explained(root: Path, command: str, title: str) -> None:
    text = section((root / "docs" / "evaluation.md").read_text(encoding="utf-8"), title)
    parser = argparse.ArgumentParser(add_help=False)
    load(command).add_arguments(parser)
    there = {option for action in parser._actions for option in action.option_strings}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))
    plain = {"--shown", "--sheets"}  # --help says enough
    of_vbench = {"--ratio", "--mode", "--videos_path", "--dimension", "--output_path", "--videos", "--output"}
    assert there - plain <= named
    assert named - there <= of_vbench


def test_every_figure_is_explained(root: Path) -> None:
    text = (root / "docs" / "evaluation.md").read_text(encoding="utf-8")
    measured = {field.name for field in fields(ClipMeasures)} - {"frames", "height", "width"}
    assert measured <= set(re.findall(r"`(\w+)`", section(text, "Measuring the clips")))
    assert FIGURES.keys() <= set(re.findall(r"`(\w+)`", section(text, "Comparing two folders")))

"""docs/evaluation.md says what the commands take and what the planner predicts."""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from stepvideo_client.evaluation.batch_options import add_batch_arguments
from stepvideo_serve.planning.layouts import main as plan_layout
from tests.test_documents import rows, section

CLIPS = {"Step-Video-TI2V-Eval": 298, "VBench-I2V": 1118 * 5}
STEPS = 50


@pytest.fixture
def document(root: Path) -> str:
    return (root / "docs" / "evaluation.md").read_text(encoding="utf-8")


def evaluations(root: Path) -> list[float]:
    """Of exact, balanced and fast on the toy world at CFG 9, shift 13, as docs/quality.md has them."""
    quality = (root / "docs" / "quality.md").read_text(encoding="utf-8").partition("CFG 9, shift 13, 50 steps:")[2]
    return [float(re.search(rf"^\| {name} \| ([\d.]+) ", quality, re.M)[1]) for name in ("exact", "balanced", "fast")]  # type: ignore[index]


def cell(values: Sequence[float], digits: int) -> str:
    return " / ".join(f"{value:,.{digits}f}" for value in values)


def test_the_hours_are_the_planners(root: Path, document: str, capsys: pytest.CaptureFixture[str]) -> None:
    table = rows(section(document, "What it takes"))
    assert len(table) == 10
    for gpus, precision, layout, clip, eval_hours, eval_gpu_hours, vbench_days, vbench_gpu_hours in table:
        count, gpu = gpus.split(" x ")
        assert plan_layout(["--gpu", gpu, "--gpus", count, "--precision", precision, "--json"]) == 0
        plan = json.loads(capsys.readouterr().out)
        assert layout == f"`{plan['recommended']}`"
        [chosen] = [entry for entry in plan["layouts"] if entry["layout"] == plan["recommended"]]
        skipped = [(STEPS - its) * chosen["step_s"]["total"] for its in evaluations(root)]
        seconds = [chosen["request_s"] - skipped_s for skipped_s in skipped]
        hours = {name: [clips * one / 3600 for one in seconds] for name, clips in CLIPS.items()}
        assert clip == cell(seconds, 0)
        assert eval_hours == cell(hours["Step-Video-TI2V-Eval"], 1)
        assert eval_gpu_hours == cell([int(count) * one for one in hours["Step-Video-TI2V-Eval"]], 0)
        assert vbench_days == cell([one / 24 for one in hours["VBench-I2V"]], 1)
        assert vbench_gpu_hours == cell([int(count) * one for one in hours["VBench-I2V"]], 0)


def test_every_option_is_explained_and_none_is_made_up(document: str) -> None:
    parser = argparse.ArgumentParser()
    add_batch_arguments(parser)
    there = {option for action in parser._actions for option in action.option_strings}
    named = set(re.findall(r"--[a-z][a-z-]*", section(document, "Making the clips")))
    assert named - there == {"--config", "--timeout"}, "of serve and of ready"
    elsewhere = {"--help", "--quiet", "--idle-timeout", "--header", "--tls"}  # plain, or in client/README.md
    elsewhere |= {"--root-certificates", "--private-key", "--certificate-chain"}
    assert {option for option in there if option.startswith("--")} - elsewhere <= named

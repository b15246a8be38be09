"""docs/first-video.md says what is so: the checkpoint's files and sizes, the configuration, options, predictions."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from stepvideo_serve.config import ServeConfig
from stepvideo_serve.doctor.of_checkpoint import SINGLE_FILES, SOURCE
from stepvideo_serve.geometry import VideoGeometry
from stepvideo_serve.planning.layouts import main as plan_layout
from stepvideo_serve.planning.model_size import PUBLISHED, model_size

SECONDS_OF_HF = 60.0


@pytest.fixture(scope="module")
def page() -> str:
    return (Path(__file__).parents[1] / "docs" / "first-video.md").read_text(encoding="utf-8")


def command_lines(page: str) -> list[list[str]]:
    """The words of every command in the page, without comments."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    lines = "\n".join(text for language, text in blocks if not language).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line.partition(" |")[0], comments=True))]


def rows(page: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:2] == "| "]


def test_every_file_that_the_server_opens_is_in_the_table(page: str) -> None:
    for name in SINGLE_FILES:
        folder = f"`{name.parts[0]}/"
        [row] = [row for row in rows(page) if row[0].startswith(folder)]
        assert name.name in row[0], name


def test_the_parameters_are_those_of_the_networks(page: str) -> None:
    size = model_size(PUBLISHED)
    counted = {
        "transformer": size.dit.cut + size.dit.whole,
        "step_llm": size.llm.cut + size.llm.whole,
        "hunyuan_clip": size.clip_parameters,
        "vae": size.vae_encoder_parameters + size.vae_decoder_parameters,
    }
    for folder, count in counted.items():
        [row] = [row for row in rows(page) if row[0].startswith(f"`{folder}/")]
        assert row[1] == f"{count:,} `[exact]`"
        assert row[2].startswith(f"{count * 2 / 1e9:.1f} GB")


def test_the_files_are_those_that_are_known_of_the_release(page: str, shared: Path) -> None:
    known = json.loads((shared / "goldens" / "full_size_config.json").read_text(encoding="utf-8"))
    layout = known["weights_layout"]["value"]
    of_folder = {row[0].partition("/")[0].lstrip("`"): row[0] for row in rows(page)}
    for part in ("transformer", "step_llm"):
        shards = re.match(r"\d+ shards", layout[part])
        assert shards is not None
        assert f"({shards[0]})" in of_folder[part]
    assert layout["clip"] in of_folder["hunyuan_clip"]
    total = re.search(r"= ([\d,]+) = total_size", known["step_llm"]["source"])
    assert total is not None
    assert int(total[1].replace(",", "")) == 2 * model_size(PUBLISHED).llm.cut + 2 * model_size(PUBLISHED).llm.whole
    assert "vae_v2.safetensors" in layout["vae"]


def test_the_configuration_of_one_gpu(page: str, tmp_path: Path) -> None:
    [text] = re.findall(r"^```toml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    path = tmp_path / "first.toml"
    path.write_text(text, encoding="utf-8")
    config = ServeConfig.load(path)
    model, limits = config.model, config.limits
    assert (model.backend, model.precision, model.device, config.denoiser.layout) == ("eager", "bf16", "cuda", "single")
    assert limits.max_tokens == VideoGeometry(102, 544, 992).tokens == VideoGeometry(102, 992, 544).tokens
    assert max(limits.max_height, limits.max_width) == 992
    assert set(tomllib.loads(text)) == {"model", "limits", "card"}


def test_options_and_targets_exist(page: str, root: Path) -> None:
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    modules, targets = set(), set()
    for words in command_lines(page):
        if words[0] == "make":
            targets.add(words[1])
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), words
            for variable in (word.partition("=")[0] for word in words[2:]):
                assert re.search(rf"\$\({variable}\)|\b{variable} \?=", makefile), variable
        if "-m" in words and words[words.index("-m") + 1].startswith("export."):
            module = words[words.index("-m") + 1]
            modules.add(module)
            parser = importlib.import_module(module)._parser()
            parser.parse_args(words[words.index(module) + 1 :])
    assert {"export.calibrate", "export.sensitivity"} <= modules
    assert {"setup", "serve", "engines", "verify"} <= targets


def test_hf_has_the_options_of_the_page(page: str) -> None:
    """As far as its help says; nothing is downloaded."""
    program, environment = Path(sys.executable).parent / "hf", os.environ | {"HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
    lines = [words for words in command_lines(page) if words[0].endswith("/hf")]
    assert len(lines) == 2
    for words in lines:
        at = words.index(SOURCE)
        asked = subprocess.run(
            [program, *words[1:at], "--help"],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=SECONDS_OF_HF,
        ).stdout
        for option in (word for word in words if word.startswith("--")):
            assert option in asked, option
        assert "--revision" in asked


def planned(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    """The recommended layout."""
    assert plan_layout([*options, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    [chosen] = [entry for entry in plan["layouts"] if entry["layout"] == plan["recommended"]]
    found: dict[str, Any] = chosen
    return found


def test_predicted_figures_are_the_planners(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    one = planned(capsys, "--gpu", "H200", "--gpus", "1", "--precision", "bf16")
    assert f"{one['memory_bytes']['fullest_gpu']['whole'] / 2**30:.0f} GiB together" in page
    eight = planned(capsys, "--gpu", "H100", "--gpus", "8", "--precision", "fp8", "--both-orientations")
    assert f"{eight['memory_bytes']['fullest_gpu'][eight['step_llm']] / 2**30:.0f} GiB of the first in FP8" in page
    assert f"`{eight['layout']}` in FP8" in page
    assert f"{eight['request_s']:.0f} s for 102 frames" in page
    wide = planned(capsys, "--gpu", "H100", "--gpus", "8", "--precision", "bf16", "--both-orientations")
    assert f"`{wide['layout']}` with `SPLIT_LLM=1` in bf16" in page
    assert wide["step_llm"] == "split"

"""The command: what it prints, recommends and refuses."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stepvideo_serve.errors import CheckpointError
from stepvideo_serve.planning.layouts import main
from stepvideo_serve.planning.model_size import PUBLISHED, ModelConfigs
from stepvideo_serve.planning.prices import Estimate, Measures, Price, PriceFile, Served, Setting
from stepvideo_serve.request.presets import Preset

Capture = pytest.CaptureFixture[str]


def plan(capsys: Capture, *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_the_tables(root: Path) -> None:
    command = [sys.executable, "-m", "stepvideo_serve", "layouts", "--gpu", "H100", "--gpus", "8"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert done.stderr == ""
    assert "102 frames of 544x992 (37,944 tokens), 50 steps, bf16, 8 x H100 (79 GiB, NVLink 4)." in lines
    starts = [line.split()[0] for line in lines if line]
    for layout in ("tp8", "sp8", "tp4.sp2", "tp2.sp4", "cfg2.tp4", "cfg2.sp4", "cfg2.tp2.sp2"):
        assert 2 <= starts.count(layout) <= 3  # memory, a step, and perhaps a group of GPUs
    assert lines[-1].startswith("Recommended: ")
    assert max(len(line) for line in lines[:-1]) <= 120


def test_everything_as_json(capsys: Capture) -> None:
    result = plan(capsys, "--gpu", "h100", "--gpus", "8", "--steps", "10")
    assert (result["gpu"], result["tokens"], result["text_tokens"], result["steps"]) == ("H100", 37944, 397, 10)
    layouts = {layout["layout"]: layout for layout in result["layouts"]}
    assert len(layouts) == 7
    assert [layout["request_s"] for layout in result["layouts"]] == sorted(x["request_s"] for x in result["layouts"])
    tp8 = layouts["tp8"]
    assert tp8["step_llm"] == "split"
    assert tp8["memory_bytes"]["fullest_gpu"]["split"] < tp8["memory_bytes"]["available"]
    held = tp8["memory_bytes"]["holdings"]
    on_first = [holding["total"] for holding in held if holding["gpu"] == 0]
    assert sum(on_first) == tp8["memory_bytes"]["fullest_gpu"]["split"]
    assert {holding["process"] for holding in held} == {
        *(f"rank {rank}" for rank in range(8)),
        *("text_encoder", "vae_encoder", "tritonserver"),
    }
    assert [exchange["collective"] for exchange in tp8["step_exchanges"]] == ["sum_tp"]
    assert tp8["step_exchanges"][0]["payload_bytes"] == 3 * 48 * 2 * 37944 * 6144 * 2
    assert tp8["step_flops"]["total"] == sum(v for k, v in tp8["step_flops"].items() if k != "total")
    assert tp8["request_s"] > 10 * tp8["step_s"]["total"]


def test_a_complete_layout_is_recommended_before_a_faster_one(capsys: Capture) -> None:
    """On 80 GB the DiT in bf16 leaves no room for Step-LLM, unless tensor parallelism cuts both."""
    result = plan(capsys, "--gpu", "H100", "--gpus", "8")
    fastest = result["layouts"][0]
    recommended = next(layout for layout in result["layouts"] if layout["layout"] == result["recommended"])
    assert fastest["step_llm"] == "elsewhere"
    assert recommended["step_llm"] == "split"
    complete = [layout["request_s"] for layout in result["layouts"] if layout["step_llm"] in ("split", "whole")]
    assert recommended["request_s"] == min(complete)
    assert fastest["layout"] in result["reason"]


@pytest.mark.parametrize(
    ("arguments", "recommended", "reason"),
    [
        ("--gpu B200 --gpus 1", "single", "Step-LLM whole on GPU 0, .* the fastest layout, and everything fits"),
        ("--gpu H100 --gpus 1", "single", "Step-LLM on another GPU, .* none leaves room"),
        ("--gpu H100 --gpus 1 --precision fp8", "single", "Step-LLM whole on GPU 0, .* everything fits"),
        ("--gpu L40S --gpus 1", None, "Nothing is recommended: even without Step-LLM a GPU needs .* and has 44"),
        ("--gpu L40S --gpus 8", "tp8", "Step-LLM in slices, .* only with Step-LLM on another GPU"),
    ],
)
def test_what_is_recommended_and_why(capsys: Capture, arguments: str, recommended: str | None, reason: str) -> None:
    result = plan(capsys, *arguments.split())
    assert result["recommended"] == recommended
    assert re.search(reason, result["reason"])


def test_smaller_videos_take_less(capsys: Capture) -> None:
    machine = ("--gpu", "H200", "--gpus", "1")
    (large,) = plan(capsys, *machine)["layouts"]
    (small,) = plan(capsys, *machine, "--frames", "34", "--height", "272", "--width", "496")["layouts"]
    assert small["step_flops"]["total"] < large["step_flops"]["total"] / 12
    of_small, of_large = (
        {holding["process"]: holding for holding in plan["memory_bytes"]["holdings"]} for plan in (small, large)
    )
    decoders = [found["vae_decoder"]["activations"] for found in (of_small, of_large)]
    assert decoders[0] == pytest.approx(decoders[1] / 4)
    assert of_small["rank 0"]["weights"] == of_large["rank 0"]["weights"]
    assert small["decode_s"] < large["decode_s"] / 12


def test_a_checkpoint_instead_of_the_published_model(capsys: Capture, mini_checkpoint: Path) -> None:
    result = plan(capsys, "--gpu", "L40S", "--gpus", "2", "--model-dir", str(mini_checkpoint))
    assert {layout["layout"] for layout in result["layouts"]} == {"cfg2", "tp2", "sp2"}
    assert result["layouts"][0]["memory_bytes"]["holdings"][0]["weights"] < 10**8


def test_the_published_sizes_are_those_of_the_release(shared: Path) -> None:
    sizes = json.loads((shared / "goldens" / "full_size_config.json").read_text())
    transformer, llm, clip, vae = (sizes[part]["value"] for part in ("transformer", "step_llm", "hunyuan_clip", "vae"))
    assert type(PUBLISHED.dit).from_dict(transformer, "the release") == PUBLISHED.dit
    assert (PUBLISHED.llm.width, PUBLISHED.llm.num_heads) == (llm["hidden_size"], llm["num_attention_heads"])
    assert (PUBLISHED.llm.num_groups, PUBLISHED.llm.num_layers) == (llm["num_attention_groups"], llm["num_layers"])
    assert (PUBLISHED.llm.ffn_width, PUBLISHED.llm.vocab_size) == (llm["ffn_hidden_size"], llm["padded_vocab_size"])
    assert PUBLISHED.clip == {name: clip[name] for name in PUBLISHED.clip}
    for half, widths in (("encoder", PUBLISHED.vae.encoder_widths), ("decoder", PUBLISHED.vae.decoder_widths)):
        assert widths == tuple(vae[half]["ch"] * factor for factor in vae[half]["ch_mult"])
    assert PUBLISHED.vae.encoder_stem == vae["encoder"]["ch"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            "--gpu A100 --gpus 8",
            "The GPU must be one of H100, H200, B200, L40S, got 'A100': choose the nearest of these.",
        ),
        (
            "--gpu H100 --gpus 3",
            "A layout of a DiT with 48 heads needs 1, 2, 4, 8, 16, 32 GPUs, got 3: use one of these numbers.",
        ),
        ("--gpu H100 --gpus 0", "got 0: use one of these numbers."),
        ("--gpu H100 --gpus two", "Argument --gpus: invalid int value: 'two': see --help."),
        ("--gpu H100", "The following arguments are required: --gpus: see --help."),
        ("--gpu H100 --gpus 8 --precision int8", "invalid choice: 'int8'"),
        ("--gpu H100 --gpus 8 --frames 100", "NUM_FRAMES must be a positive multiple of 17, got 100: use 85 or 102."),
        ("--gpu H100 --gpus 8 --steps 0", "--steps must be at least 1, got 0: correct it."),
        ("--gpu H100 --gpus 8 --model-dir no/such", "The model directory no/such must exist, found no such folder."),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(capsys: Capture, arguments: str, sentence: str) -> None:
    assert main(arguments.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.endswith(".\n")
    assert err.count("\n") == 1
    assert sentence in err


def test_a_checkpoint_without_the_configuration_of_its_clip_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="clip_text_encoder"):
        ModelConfigs.load(tmp_path)


PRESETS = """
[model]
dir = "none"
engines_dir = "none"

[presets.mask]
rule = "fixed"
mask = "1100000001"
cfg_scale = 9
time_shift = 13

[presets.late]
rule = "exact"
guidance_from = 0.1

[presets.quick]
rule = "adaptive"
tolerance = 0.1
dense_start = 0.01
dense_end = 0.6
longest_streak = 8

[pricing]
files = ["prices.json"]
"""


def test_seconds_by_preset(capsys: Capture, tmp_path: Path) -> None:
    """A mask's evaluations are known, others come from price files; without guidance cfg2 gains nothing."""
    config = tmp_path / "serve.toml"
    config.write_text(PRESETS)
    one = Estimate(5.0, 5.0, 5.0, 5.0, 5.0)
    measures = Measures(16, replace(one, mean=10.0), 0.5, one, None, one, None, None, {})
    late = Preset("exact", guidance_from=0.1)
    price = Price("late", late.parameters(), Setting(102, 544, 992, 10, 9.0, 7.0), measures)
    PriceFile.of(Served("x", "bf16", "eager", "single"), [price], []).save(tmp_path / "prices.json")
    arguments = ("--gpu", "H200", "--gpus", "8", "--steps", "10", "--config", str(config))
    layouts = {layout["layout"]: layout for layout in plan(capsys, *arguments)["layouts"]}
    for name, layout in layouts.items():
        seconds, whole_s, step_s = layout["preset_s"], layout["request_s"], layout["step_s"]["total"]
        assert seconds["exact"] == pytest.approx(whole_s)
        assert seconds["mask"] == pytest.approx(whole_s - 7 * step_s)
        assert seconds["quick"] is None, "nobody has measured it"
        if name.startswith("cfg2"):
            assert seconds["late"] == pytest.approx(whole_s)
        else:
            assert whole_s - 5 * step_s < seconds["late"] < whole_s - 1.5 * step_s
    assert main(list(arguments)) == 0
    lines = capsys.readouterr().out.splitlines()
    [head] = [line for line in lines if "mask (3)" in line]
    assert head.split() == ["layout", "exact", "(10)", "mask", "(3)", "late", "(10)", "quick"]
    assert any("skipping a branch gains nothing" in line for line in lines)

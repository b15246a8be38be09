"""Golden folders without weights, which are made by rule (weight_rule.py) into our modules.

goldens.json, goldens.safetensors          DiT cases
vae_goldens.json, vae_goldens.safetensors  Video-VAE cases, among them the real widths
medium.json, {dit,vae}_out.safetensors     one DiT and one Video-VAE of middle size
"""

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from export.goldens.answers import MODULE_TOLERANCE, UNKNOWN
from export.goldens.compare import compare
from export.goldens.dit import dit_rows, run_module
from export.goldens.folder import read_json
from export.goldens.report import Report
from export.goldens.weight_rule import made_by_rule, normal_for
from stepvideo_serve.dit.config import DiTConfig
from stepvideo_serve.dit.model import StepVideoDiT
from stepvideo_serve.errors import ExportError
from stepvideo_serve.text.states import CLIP_TOKENS, LLM_MAX_TOKENS
from stepvideo_serve.vae.config import VAEConfig
from stepvideo_serve.vae.model import VideoDecoder, VideoEncoder
from stepvideo_serve.weights.files import open_safetensors

Progress = Callable[[str], None]
Tensors = dict[str, Tensor]
TEXT_TO_VIDEO = "a text-to-video variant, which is not served"
TEXT_SCALE = 2.0
VAE_SEED_OFFSET = 3  # medium.json gives one seed; the Video-VAE's weights are made with this much more


def is_by_rule(folder: Path) -> bool:
    """Whether the goldens in `folder` come without a checkpoint."""
    if (folder / "medium.json").is_file() or (folder / "vae_goldens.json").is_file():
        return True
    return (folder / "goldens.json").is_file() and "cases" in read_json(folder / "goldens.json")


def verify_by_rule(folder: Path, progress: Progress) -> Report:
    """Raises ExportError or CheckpointError when a file is damaged."""
    began_s = time.monotonic()
    report = Report()
    try:
        if (folder / "goldens.json").is_file():
            _dit_cases(report, folder, progress)
        if (folder / "vae_goldens.json").is_file():
            _vae_cases(report, folder, progress)
        if (folder / "medium.json").is_file():
            _medium(report, folder, progress)
    except (KeyError, TypeError) as error:
        raise ExportError(f"{folder} must describe its cases in full, found {type(error).__name__}: {error}.") from None
    report.seconds = time.monotonic() - began_s
    return report


def _dit_cases(report: Report, folder: Path, progress: Progress) -> None:
    file = open_safetensors(folder / "goldens.safetensors")
    for name, case in read_json(folder / "goldens.json")["cases"].items():
        tensors = _tensors(file, f"{name}.")
        if not case["cfg"]["use_additional_conditions"]:
            report.skipped |= {f"{name}.{part}": TEXT_TO_VIDEO for part in tensors}
            continue
        progress(f"{name}: DiT of {case['cfg']['num_layers']} layers")
        seed, config = case["seed"], DiTConfig.from_dict(case["cfg"], name)
        latents = tensors["latents"]
        batch, _, channels, height, width = latents.shape
        condition = torch.zeros_like(latents)
        condition[:, 0] = normal_for("cond", seed, (1, 1, channels, height, width))[0, 0]
        text = normal_for("text", seed, (batch, LLM_MAX_TOKENS, config.llm_channels), TEXT_SCALE)
        clip = normal_for("clip", seed, (batch, CLIP_TOKENS, config.clip_channels))
        inputs = {
            "latents": latents,
            "cond": condition,
            "timestep": torch.tensor(case["t"]),
            "motion_score": torch.tensor([case["ms"]]),
            "text": text,
            "clip": clip,
            "mask": tensors["mask"],
        }
        out, sums = _run_dit(config, seed, inputs)
        ours = {
            "latents": normal_for("latents", seed, latents.shape),
            "cond": condition,
            "text_head": text[:, : tensors["text_head"].shape[1]],
            "clip_head": clip[:, : tensors["clip_head"].shape[1]],
            "out": out,
        }
        report.given.append(f"{name}.mask")
        _compare_all(report, name, ours, {part: x for part, x in tensors.items() if part != "mask"})
        _compare_sums(report, name, sums, {key: pair[1] for key, pair in case["weight_checksums"].items()})


def _vae_cases(report: Report, folder: Path, progress: Progress) -> None:
    file = open_safetensors(folder / "vae_goldens.safetensors")
    for name, case in read_json(folder / "vae_goldens.json")["cases"].items():
        tensors = _tensors(file, f"{name}.")
        config, seed = vae_config(case["cfg"]), case["seed"]
        progress(f"{name}: Video-VAE decoder of {list(config.decoder_widths)} channels")
        decoded, sums = _run_decoder(config, seed, tensors["z"])
        ours = {"dec": decoded}
        progress(f"{name}: Video-VAE encoder of {list(config.encoder_widths)} channels")
        sources = ("img", "vid")
        moments, encoder_sums = _run_encoder(config, seed, [tensors[source] for source in sources])
        ours |= {f"{source}_moments": each for source, each in zip(sources, moments, strict=True)}
        inputs = ("z", *sources)
        report.given += [f"{name}.{part}" for part in inputs]
        _compare_all(report, name, ours, {part: x for part, x in tensors.items() if part not in inputs})
        _compare_sums(report, name, sums | encoder_sums, case["weight_abs_sums"])


def _medium(report: Report, folder: Path, progress: Progress) -> None:
    settings = read_json(folder / "medium.json")
    sizes, seed = settings["inputs"], settings["seed"]
    progress("medium: DiT")
    config = DiTConfig.from_dict(settings["dit"], "medium.json")
    golden = _tensors(open_safetensors(folder / "dit_out.safetensors"), "")
    out, _ = _run_dit(config, seed, _medium_inputs(config, sizes, seed))
    _compare_all(report, "dit_out", {"out": out}, golden)
    progress("medium: Video-VAE")
    tensors = _tensors(open_safetensors(folder / "vae_out.safetensors"), "")
    vae, vae_seed = vae_config(settings["vae"]), seed + VAE_SEED_OFFSET
    ours = {"dec": _run_decoder(vae, vae_seed, tensors["z"])[0]}
    ours["moments"] = _run_encoder(vae, vae_seed, [tensors["img"]])[0][0]
    report.given += ["vae_out.z", "vae_out.img"]
    _compare_all(report, "vae_out", ours, {part: x for part, x in tensors.items() if part not in ("z", "img")})


def _medium_inputs(config: DiTConfig, sizes: Mapping[str, Any], seed: int) -> Tensors:
    frames, height, width = sizes["latent_fhw"]
    valid = torch.tensor(sizes["llm_valid"])
    batch = len(valid)
    condition = torch.zeros(batch, frames, config.in_channels, height, width)
    condition[:, 0] = normal_for("medium.cond", seed, (1, 1, config.in_channels, height, width))[0, 0]
    return {
        "latents": normal_for("medium.lat", seed, condition.shape),
        "cond": condition,
        "timestep": torch.full((batch,), float(sizes["timestep"])),
        "motion_score": torch.tensor([float(sizes["motion_score"])]),
        "text": normal_for("medium.text", seed, (batch, LLM_MAX_TOKENS, config.llm_channels), TEXT_SCALE),
        "clip": normal_for("medium.clip", seed, (batch, CLIP_TOKENS, config.clip_channels)),
        "mask": (torch.arange(CLIP_TOKENS + LLM_MAX_TOKENS) < (CLIP_TOKENS + valid)[:, None]).long(),
    }


def vae_config(values: Mapping[str, Any]) -> VAEConfig:
    """From the description that the official code would need: widths are a base times a multiple per level."""
    encoder, decoder = values["encoder"], values["decoder"]
    return VAEConfig(
        z_channels=values["z_channels"],
        num_res_blocks=values["num_res_blocks"],
        encoder_stem=encoder["ch"],
        encoder_widths=tuple(encoder["ch"] * multiple for multiple in encoder["ch_mult"]),
        decoder_widths=tuple(decoder["ch"] * multiple for multiple in decoder["ch_mult"]),
    )


def _run_dit(config: DiTConfig, seed: int, inputs: Tensors) -> tuple[Tensor, dict[str, float]]:
    model, sums = made_by_rule(lambda: StepVideoDiT(config), seed)
    return torch.cat([run_module(model, row, ["out"])["out"] for row in dit_rows(inputs)]), sums


def _run_decoder(config: VAEConfig, seed: int, latents: Tensor) -> tuple[Tensor, dict[str, float]]:
    decoder, sums = made_by_rule(lambda: VideoDecoder(config), seed, prefix="decoder.")
    return decoder(latents), sums


def _run_encoder(config: VAEConfig, seed: int, videos: Iterable[Tensor]) -> tuple[list[Tensor], dict[str, float]]:
    """Mean and log variance of each video, side by side in the channels."""
    encoder, sums = made_by_rule(lambda: VideoEncoder(config), seed, prefix="encoder.")
    return [torch.cat(encoder(video), dim=2) for video in videos], sums


def _tensors(file: safe_open, prefix: str) -> Tensors:
    """The tensors whose names begin with `prefix`, without it."""
    return {key.removeprefix(prefix): file.get_tensor(key) for key in list(file.keys()) if key.startswith(prefix)}


def _compare_all(report: Report, case: str, ours: Tensors, golden: Tensors) -> None:
    for part, tensor in golden.items():
        if part in ours:
            report.rows.append(compare(f"{case}.{part}", ours[part], tensor, MODULE_TOLERANCE))
        else:
            report.skipped[f"{case}.{part}"] = UNKNOWN.reason


def _compare_sums(report: Report, case: str, ours: Mapping[str, float], golden: Mapping[str, float]) -> None:
    """The weights themselves, by the sum of the magnitudes of each."""
    if differing := sorted(ours.keys() ^ golden.keys()):
        raise ExportError(f"{case} must list the weights of our module, but {differing[0]} is in one of the two only.")
    ratios = torch.tensor([ours[key] / golden[key] for key in golden], dtype=torch.float64)
    report.rows.append(compare(f"{case}.weights", ratios, torch.ones_like(ratios), MODULE_TOLERANCE))

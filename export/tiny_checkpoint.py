"""A small random checkpoint of the exact architecture, in the official layout.

    python -m export.tiny_checkpoint --out DIR [--seed N]

For the demo and for tests: keys, file names, quirks and code paths are those of the real weights, the video is noise.
The same seed gives the same bytes. DIR appears whole or not at all; made with the same seed by the same code, it is
left alone.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from export.goldens.weight_rule import weight_for
from export.tiny.config import MODEL_INDEX, SCHEDULER, TinyConfig, clip_json, llm_json
from export.tiny.tokenizers import train_step_model, write_clip_tokenizer
from stepvideo_serve.assembly.checkpoint import vae_file_key
from stepvideo_serve.errors import ExportError

DEFAULT_SEED = 7
MARKER = "tiny_checkpoint.json"
SOURCES = ("tiny_checkpoint.py", "tiny/config.py", "tiny/tokenizers.py", "goldens/weight_rule.py")
PARTS = ("transformer", "step_llm", "hunyuan_clip", "vae")


def random_state(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """A bf16 tensor for every key, which depends on seed, key and shape only. Activations stay near 1, and every
    parameter is far enough from its neutral value to matter (export/goldens/weight_rule.py)."""
    return {key: weight_for(key, shape, seed).to(torch.bfloat16) for key, shape in shapes.items()}


def write_checkpoint(folder: Path, config: TinyConfig | None = None, seed: int = DEFAULT_SEED) -> None:
    """Writes all parts of `config` (TinyConfig() by default) into `folder`, which must not hold any yet."""
    config = config or TinyConfig()
    states = {part: random_state(shapes, seed) for part, shapes in config.shapes().items()}
    write_json(folder / "model_index.json", MODEL_INDEX)
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    transformer = folder / "transformer"
    write_json(transformer / "config.json", config.dit.to_dict())
    save_weights(transformer, "diffusion_pytorch_model", states["dit"], config.dit_shards)
    step_llm = folder / "step_llm"
    write_json(step_llm / "config.json", llm_json(config.llm))
    save_weights(step_llm, "model", states["llm"])
    (step_llm / "step1_chat_tokenizer.model").write_bytes(train_step_model())
    clip = folder / "hunyuan_clip"
    write_json(clip / "clip_text_encoder" / "config.json", clip_json(config.clip))
    save_weights(clip / "clip_text_encoder", "model", states["clip"])
    write_clip_tokenizer(clip / "tokenizer")
    (folder / "vae").mkdir()
    save_weights(folder / "vae", "vae_v2", {vae_file_key(key): tensor for key, tensor in states["vae"].items()})


def save_weights(folder: Path, stem: str, state: Mapping[str, Tensor], shards: int = 1) -> None:
    """Writes `stem`.safetensors, or `shards` files of about equal size and their index."""
    if shards == 1:
        _save(folder / f"{stem}.safetensors", state)
        return
    total = sum(tensor.nbytes for tensor in state.values())
    weight_map: dict[str, str] = {}
    before = 0
    for key in sorted(state):
        weight_map[key] = f"{stem}-{before * shards // total + 1:05d}-of-{shards:05d}.safetensors"
        before += state[key].nbytes
    for name in sorted(set(weight_map.values())):
        _save(folder / name, {key: state[key] for key, file in weight_map.items() if file == name})
    write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Makes the folder where needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def make(out: Path, seed: int = DEFAULT_SEED) -> bool:
    """Makes the checkpoint in `out`, in the place of an earlier one by this tool; False when that one is the same.

    Raises ExportError when `out` holds anything else.
    """
    marker = {"seed": seed, "made_by": _recipe_digest()}
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and _read_marker(out) == marker:
        return False
    out.parent.mkdir(parents=True, exist_ok=True)
    new, old = (out.with_name(f".{out.name}.{kind}-{os.getpid()}") for kind in ("new", "old"))
    new.mkdir()
    try:
        write_checkpoint(new, seed=seed)
        write_json(new / MARKER, marker)
        if out.exists():
            out.rename(old)
        new.rename(out)
    finally:
        for left in (new, old):
            if left.exists():
                shutil.rmtree(left)
    return True


def _save(path: Path, state: Mapping[str, Tensor]) -> None:
    save_file(dict(state), path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors makes files that only their owner can read


def _recipe_digest() -> str:
    """Changes with the code that decides what is in a checkpoint, and with the networks' keys and shapes."""
    digest = hashlib.sha256(repr(TinyConfig().shapes()).encode())
    for name in SOURCES:
        digest.update((Path(__file__).parent / name).read_bytes())
    return digest.hexdigest()


def _read_marker(out: Path) -> object:
    try:
        return json.loads((out / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ExportError(
            f"{out} must be absent, empty or an earlier tiny checkpoint, found other files: choose another folder."
        ) from None


def _summary(folder: Path) -> str:
    sizes = {part: sum(p.stat().st_size for p in (folder / part).rglob("*") if p.is_file()) for part in PARTS}
    return ", ".join(f"{part} {size / 2**20:.1f} MiB" for part, size in sizes.items())


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m export.tiny_checkpoint", description="Write a small random checkpoint in the official layout."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to make, or to replace when made by this tool")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED, help="decides every weight (default %(default)s)")
    arguments = parser.parse_args()
    try:
        made = make(arguments.out, arguments.seed)
    except (ExportError, OSError) as error:
        print(f"tiny_checkpoint: {error}", file=sys.stderr)
        return 2
    done = "written to" if made else "is already in"
    print(f"Tiny checkpoint of seed {arguments.seed} {done} {arguments.out}: {_summary(arguments.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

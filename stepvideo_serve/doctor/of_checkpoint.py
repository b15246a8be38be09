"""The checkpoint: every file there and whole, weights and configurations of one model, tokenizers of that model."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from stepvideo_serve.assembly.checkpoint import (
    CLIP_CONFIG,
    CLIP_TOKENIZER,
    CONFIGS,
    PARTS,
    STEP_TOKENIZER,
    TOKENIZERS,
    Checkpoint,
)
from stepvideo_serve.doctor.case import Case
from stepvideo_serve.doctor.finding import Findings, fault, ok, unseen, warning
from stepvideo_serve.errors import CheckpointError
from stepvideo_serve.weights.exposed import exposed
from stepvideo_serve.weights.files import INDEX_SUFFIX, STATE_DICT, open_safetensors

SOURCE: Final = "stepfun-ai/stepvideo-ti2v"
"""Where the published checkpoint is."""
VAE_WEIGHTS: Final = Path("vae", "vae_v2.safetensors")
SINGLE_FILES: Final = (*CONFIGS.values(), VAE_WEIGHTS, STEP_TOKENIZER, CLIP_TOKENIZER / "vocab.txt")
FOLDERS: Final = (Path("transformer"), Path("step_llm"), CLIP_CONFIG.parent)
"""Of weights in one file or several shards."""


def checkpoint(case: Case) -> Findings:
    """Every file of the official layout, and each part's weights against its configuration, by the files' headers."""
    folder = case.config.model.dir
    if not folder.is_dir():
        yield fault(f"The model directory {folder} must exist, found no such folder.", fetch(folder))
        return
    missing, broken = missing_files(folder), list(broken_files(folder))
    for name in missing:
        yield fault(f"{folder / name} is missing.", fetch(folder, name))
    for name, sentence in broken:
        yield fault(sentence, f"{fetch(folder, name)} --force-download")
    if missing or broken:
        return
    opened = Checkpoint(folder)
    faults = 0
    for part in PARTS:
        if part != TOKENIZERS:
            try:
                opened.check(part)
            except CheckpointError as error:
                faults += 1
                yield fault(str(error), f"use the files of one checkpoint: {fetch(folder)}")
    if not faults:
        count = sum(1 for path in folder.rglob("*") if path.suffix in (".safetensors", ".bin"))
        yield ok(f"{folder} is complete: {count} files of weights fit their configurations (headers; not hashed).")


def tokenizers(case: Case) -> Findings:
    """Both, read as the server reads them."""
    folder = case.config.model.dir
    needed = (*CONFIGS.values(), STEP_TOKENIZER, CLIP_TOKENIZER / "vocab.txt")
    if absent := [str(name) for name in needed if not (folder / name).is_file()]:
        yield unseen(f"{', '.join(absent)} must be there first.")
        return
    opened, faults = Checkpoint(folder), 0
    for name, load in ((STEP_TOKENIZER, opened.step_tokenizer), (CLIP_TOKENIZER / "*", opened.clip_tokenizer)):
        try:
            load()
        except CheckpointError as error:
            faults += 1
            yield fault(str(error), f"{fetch(folder, name)} --force-download")
    if not faults:
        yield ok("Step-LLM's and Hunyuan-CLIP's are those of this checkpoint.")


def rights(case: Case) -> Findings:
    """Whether others could change the files while the server reads them."""
    model = case.config.model
    graphs = [] if model.backend == "eager" else [model.engines_dir, *model.weight_set]
    found = exposed([model.dir, *graphs])
    for sentence in found:
        yield warning(f"{sentence}.", "see SECURITY.md, or docs/operations.md about files that nobody else can change")
    if not found:
        yield ok("Nobody but this user and root may change what is served.")


def fetch(folder: Path, name: Path | None = None) -> str:
    """The command that brings one file, or those of a pattern, or all, of the published checkpoint."""
    if name is None:
        what = ""
    elif "*" in str(name):
        what = f" --include '{name.as_posix()}'"
    else:
        what = f" {name.as_posix()}"
    return f"hf download {SOURCE}{what} --local-dir {folder}"


def missing_files(folder: Path) -> list[Path]:
    """Relative to `folder`; a folder without any weights as a pattern."""
    missing = [name for name in SINGLE_FILES if not (folder / name).is_file()]
    for part in FOLDERS:
        indices = sorted((folder / part).glob(f"*{INDEX_SUFFIX}"))
        if indices:
            missing += [part / name for name in shards(indices[0]) if not (folder / part / name).is_file()]
        elif not [*(folder / part).glob("*.safetensors"), *(folder / part).glob(STATE_DICT)]:
            missing.append(part / "*")
    return missing


def shards(index: Path) -> list[str]:
    """The names in an index; none in one that cannot be read, which is a fault of its own."""
    try:
        return sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def broken_files(folder: Path) -> Iterator[tuple[Path, str]]:
    """Weights whose header cannot be read or whose size is not that of the header, and what is wrong with each."""
    for part in (*FOLDERS, VAE_WEIGHTS.parent):
        for path in sorted((folder / part).glob("[!.]*.safetensors")):
            try:
                with open_safetensors(path):
                    pass
            except CheckpointError as error:
                yield part / path.name, str(error)

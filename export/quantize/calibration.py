"""calibration.json: the largest magnitude of every tensor that may be quantised, and what it was measured on.

    {"format_version": 1,
     "checkpoint": {"dit": SHA-256, "llm": SHA-256, "tokenizers": SHA-256},
     "settings": {"steps": 8, "percentile": 99.99, ...},   how it was made
     "amax": {"transformer_blocks.0.attn1.wqkv": 4.1, ..., "transformer_blocks.0.attn1.core.q": 5.0, ...}}

A linear layer stands for its input under its name in the checkpoint; the core of an attention has q, k and v. The names
do not depend on how the model is cut into graphs or over ranks.
"""

import fnmatch
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepvideo_serve.assembly.checkpoint import TOKENIZERS, Checkpoint
from stepvideo_serve.errors import ExportError

FORMAT_VERSION = 1
PARTS = ("dit", "llm", TOKENIZERS)  # the prompts' tokens decide what is measured


@dataclass(frozen=True)
class Calibration:
    """amax in the unit of the tensor, finite and >= 0, by name; `checkpoint` holds digests by part of the model."""

    checkpoint: Mapping[str, str]
    settings: Mapping[str, Any]
    amax: Mapping[str, float]

    @classmethod
    def load(cls, path: Path) -> "Calibration":
        """Raises ExportError when the file is missing or has another form."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ExportError(
                f"--calibration must be a file of python -m export.calibrate, {path}: {error.strerror}."
            ) from error
        except ValueError as error:
            raise ExportError(f"{path} must be JSON in UTF-8, found: {error}; calibrate again.") from error
        version = data.get("format_version") if isinstance(data, dict) else None
        if version != FORMAT_VERSION:
            raise ExportError(f"{path} must have format_version {FORMAT_VERSION}, found {version!r}: calibrate again.")
        try:
            amax = {str(name): float(value) for name, value in data["amax"].items()}
            found = cls({part: str(data["checkpoint"][part]) for part in PARTS}, dict(data["settings"]), amax)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ExportError(
                f"{path} must have the form of a calibration, found {type(error).__name__}: {error}; calibrate again."
            ) from error
        if wrong := [name for name, value in amax.items() if not (math.isfinite(value) and value >= 0)]:
            raise ExportError(f"{path} must hold finite magnitudes, found {amax[wrong[0]]} for {wrong[0]}.")
        return found

    def save(self, path: Path) -> None:
        """Writes the file in one step, with its folder."""
        data = {
            "format_version": FORMAT_VERSION,
            "checkpoint": dict(self.checkpoint),
            "settings": dict(self.settings),
            "amax": dict(sorted(self.amax.items())),
        }
        write_json(path, data)

    def require(self, checkpoint: Checkpoint) -> None:
        """Raises ExportError unless it was measured on these very weights and tokenizers."""
        for part, found in self.checkpoint.items():
            expected = checkpoint.digest(part)
            if expected != found:
                raise ExportError(
                    f"The calibration must be of {checkpoint.folder} ({part}: {expected[:12]}), "
                    f"found one of {found[:12]}: run python -m export.calibrate again."
                )

    def of(self, name: str) -> float:
        """The amax of one tensor. Raises ExportError when it was not measured."""
        if name not in self.amax:
            raise ExportError(
                f"The calibration must hold {name}, found {len(self.amax)} other tensors: "
                "run python -m export.calibrate again."
            )
        return self.amax[name]

    def largest(self, glob: str) -> float:
        """The largest amax of the tensors that match. Raises ExportError when none does."""
        matching = [value for name, value in self.amax.items() if fnmatch.fnmatchcase(name, glob)]
        if not matching:
            raise ExportError(f"The calibration must hold {glob}, found none: run python -m export.calibrate again.")
        return max(matching)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """A reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

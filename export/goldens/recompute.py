"""Every entry of a golden folder, recomputed and compared."""

import re
import time
from collections.abc import Callable
from typing import Protocol

from export.goldens import functions, text, vae
from export.goldens.answers import UNKNOWN, Answer, Computed, Given, Skipped
from export.goldens.compare import compare
from export.goldens.dit import DiTGoldens
from export.goldens.folder import Goldens
from export.goldens.functions import FunctionGoldens
from export.goldens.networks import Networks
from export.goldens.pipeline import PipelineGoldens
from export.goldens.report import Report
from export.goldens.text import TextGoldens
from export.goldens.vae import VAEGoldens

OFFICIAL_ACCIDENTS = (
    (r"bf16\..*", "the official code in bf16, which fp32 is not to be compared with"),
    (r"\w+_round\..*", "the official code rounds noise, condition, CLIP states and text length to bf16; we do not"),
    (r"rope\..*_bf16", "the official code rounds RoPE angles to bf16 before cos and sin; we do not"),
)

Progress = Callable[[str], None]


class Family(Protocol):
    """Entries that share networks and intermediate results."""

    def recompute(self, name: str) -> Answer:
        """What our code makes of the entry. Raises SetupError."""
        ...


class _Unknown:
    def recompute(self, name: str) -> Answer:  # noqa: ARG002
        return UNKNOWN


def verify_goldens(goldens: Goldens, networks: Networks, progress: Progress) -> Report:
    """Family by family, so that the networks of one are gone before the next begins; the order is the folder's.

    Raises SetupError when the checkpoint or the goldens are broken.
    """
    began_s = time.monotonic()
    report = Report()
    groups: dict[str, list[str]] = {}
    for name in goldens.descriptions:
        groups.setdefault(_group(name), []).append(name)
    for group, names in groups.items():
        family = _family(group, goldens, networks)
        progress(f"{group}: {len(names)} entries")
        for name in names:
            answer = official_accident(name) or family.recompute(name)
            if isinstance(answer, Computed):
                report.rows.append(compare(name, answer.tensor, goldens.tensor(name), answer.tolerance))
            elif isinstance(answer, Given):
                report.given.append(name)
            else:
                report.skipped[name] = answer.reason
    report.seconds = time.monotonic() - began_s
    return report


def official_accident(name: str) -> Skipped | None:
    """Why the entry is for information only, or None."""
    for pattern, reason in OFFICIAL_ACCIDENTS:
        if re.fullmatch(pattern, name):
            return Skipped(reason)
    return None


def _group(name: str) -> str:
    prefix = name.split(".")[0]
    return "text" if prefix in text.PREFIXES else prefix


def _family(group: str, goldens: Goldens, networks: Networks) -> Family:
    if group == "text":
        return TextGoldens(goldens, networks)
    if group == vae.PREFIX:
        return VAEGoldens(goldens, networks)
    if group in functions.PREFIXES:
        return FunctionGoldens(goldens)
    if f"{group}.latents" in goldens and f"{group}.cond" in goldens:
        return DiTGoldens(goldens, networks, group)
    if f"{group}.init_latents" in goldens:
        return PipelineGoldens(goldens, networks, group)
    return _Unknown()

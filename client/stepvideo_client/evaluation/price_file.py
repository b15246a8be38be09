"""A comparison of exact with a preset -> the price file, version 1, that a server's `[pricing] files` names.

docs/quality.md describes the format; docs/price-file.schema.json says the same to tools. Everything is read from the
REPORTs of both sides, so it prices what these servers served.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from stepvideo_client.errors import InvalidInput
from stepvideo_client.evaluation.comparison import PairMeasures, PairRow, evaluations
from stepvideo_client.evaluation.results import Clip
from stepvideo_client.evaluation.statistics import estimate, estimate_known, rank_correlation

FORMAT: Final = "stepvideo-serve prices"
VERSION: Final = 1
SERVED: Final = ("checkpoint", "precision", "backend", "layout")
LEAST_CLIPS: Final = 16
"""Fewer make a price that says little: docs/quality.md."""

_NO_PARAMETERS: Final = ("preset", "evaluations", "guided_share")
_SETTING: Final = {"num_frames": "frames", "height": "height", "width": "width", "steps": "steps"}

Measured = tuple[Clip, Clip, PairMeasures]


def price_file(rows: Sequence[PairRow], checkpoint: str | None, name: str | None) -> dict[str, Any]:
    """The file as JSON values: a price for each setting and preset of B, where A and B were served alike,
    else a comparison.

    checkpoint: the identity, for servers whose REPORT does not tell; name: what a comparison is called. Raises
    InvalidInput, in one sentence, where A is not exact throughout, or something that the format needs is not known.
    """
    measured = [_measured(row) for row in rows]
    groups: dict[str, list[Measured]] = {}
    for one in measured:
        groups.setdefault(str((_parameters(one[1]), _setting(one[0]), _setting(one[1]))), []).append(one)
    of_a = _the_only([_served(a, checkpoint) for a, _, _ in measured], "A")
    served = _the_only([_served(b, checkpoint) for _, b, _ in measured], "B")
    same = of_a == served  # seconds over exact would say nothing of a preset on another layout
    prices, comparisons = [], []
    for group in groups.values():
        a, b, _ = group[0]
        entry = {"setting": _setting(a), "measures": _measures(group)}
        if same and _setting(a) == _setting(b) and not _is_exact(b):
            parameters = _parameters(b)
            prices.append({"preset": _quality(b)["preset"], "parameters": parameters, **entry})
        else:
            comparisons.append({"name": name or _difference(a, b, of_a, served), **entry})
    now = datetime.now(UTC).isoformat(timespec="seconds")
    file = {"format": FORMAT, "version": VERSION, "date": now, "served": served}
    return {**file, "prices": prices, "comparisons": comparisons}


def _measured(row: PairRow) -> Measured:
    clips = row.pair.a.clip, row.pair.b.clip
    if row.measures is None or clips[0] is None or clips[1] is None:
        why = row.fault or "it has no line in results.jsonl."
        raise _needs(f"every clip whole, {row.pair.name!r} is not: {why}")
    if not _is_exact(clips[0]):
        raise _needs(
            f"exact as A, clip {row.pair.name!r} of A was made with {clips[0].preset!r}: make A anew "
            "with quality exact."
        )
    if row.measures.latent_error is None:
        raise _needs(f"the latents of both sides, those of {row.pair.name!r} are missing: have batch keep them.")
    return clips[0], clips[1], row.measures


def _quality(clip: Clip) -> Mapping[str, Any]:
    quality = clip.report.get("quality")
    if not isinstance(quality, dict) or not {"preset", "rule", "evaluations", "guided_share", "mask"} <= quality.keys():
        raise _needs(f"`quality` in REPORT, clip {clip.id!r} has none: is its server older?")
    return quality


def _is_exact(clip: Clip) -> bool:
    return bool(_parameters(clip) == {"rule": "exact", "guidance_from": 0.0, "guidance_to": 1.0})


def _parameters(clip: Clip) -> dict[str, Any]:
    """What identifies the preset. A mask is a parameter of a fixed one; in others it says what a run did."""
    quality = _quality(clip)
    without = _NO_PARAMETERS if quality["rule"] == "fixed" else (*_NO_PARAMETERS, "mask")
    return {key: value for key, value in quality.items() if key not in without}


def _setting(clip: Clip) -> dict[str, Any]:
    found = {name: clip.report.get(key) for name, key in _SETTING.items()}
    for name in ("cfg_scale", "time_shift"):
        found[name] = clip.report.get(name, clip.request.get(name))
    if missing := [name for name, value in found.items() if not isinstance(value, int | float)]:
        raise _needs(f"{missing[0]} of every clip, REPORT and request of {clip.id!r} have none: is its server older?")
    return found


def _served(clip: Clip, checkpoint: str | None) -> dict[str, str]:
    found = {name: clip.report.get(name) for name in SERVED}
    found["checkpoint"] = checkpoint or found["checkpoint"]
    if not found["checkpoint"]:
        raise _needs(
            f"the checkpoint's identity, REPORT of {clip.id!r} has none (a server of eager torch does "
            "not tell it): give it with --checkpoint, docs/evaluation.md says how to have it."
        )
    if missing := [name for name, value in found.items() if not isinstance(value, str)]:
        raise _needs(f"{missing[0]} in REPORT, that of {clip.id!r} has none: is its server older?")
    return {name: str(value) for name, value in found.items()}


def _the_only(served: Sequence[dict[str, str]], side: str) -> dict[str, str]:
    for one in served:
        if one != served[0]:
            name = next(key for key in SERVED if one[key] != served[0][key])
            raise _needs(
                f"one {name} for all clips of {side}, got {served[0][name]!r} and {one[name]!r}: "
                "make a set per server configuration."
            )
    return served[0]


def _measures(group: Sequence[Measured]) -> dict[str, Any]:
    counts = [evaluations(b) for _, b, _ in group]
    ratios = [one.seconds_ratio for _, _, one in group]
    if None in counts or None in ratios:
        raise _needs("evaluations and step_seconds in every REPORT, some lack them: make both anew.")
    moved = [(one.motion_a_px, one.motion_b_px) for _, _, one in group if one.motion_ratio is not None]
    motion = estimate_known([one.motion_ratio for _, _, one in group])
    rank = rank_correlation([a or 0.0 for a, _ in moved], [b or 0.0 for _, b in moved]) if len(moved) > 1 else None
    return {
        "clips": len(group),
        "evaluations": estimate([count for count in counts if count is not None]).as_json(),
        "guided_share": sum(float(_quality(b)["guided_share"]) for _, b, _ in group) / len(group),
        "latent_error": estimate([one.latent_error for _, _, one in group if one.latent_error is not None]).as_json(),
        "psnr_db": estimate([one.psnr_db for _, _, one in group]).as_json(),
        "seconds_over_exact": estimate([ratio for ratio in ratios if ratio is not None]).as_json(),
        "motion": None if motion is None else motion.as_json(),
        "motion_rank": rank,
        "shares": {"ssim": sum(one.ssim for _, _, one in group) / len(group)},
    }


def _difference(a: Clip, b: Clip, of_a: Mapping[str, str], of_b: Mapping[str, str]) -> str:
    """What B is beside A, as "fp8" or "30 steps"; "the same" where nothing differs."""
    parts = [of_b[key] for key in ("precision", "layout", "backend") if of_a[key] != of_b[key]]
    if of_a["checkpoint"] != of_b["checkpoint"]:
        parts.append(f"checkpoint {of_b['checkpoint'][:12]}")
    mine, others = _setting(a), _setting(b)
    parts += [f"{others[name]:g} {name}" for name in others if mine[name] != others[name]]
    if not _is_exact(b):
        parts.append(str(_quality(b)["preset"]))
    return ", ".join(parts) or "the same"


def _needs(what: str) -> InvalidInput:
    return InvalidInput(f"--price-file needs {what}")

"""Classifier-free guidance (arXiv 2207.12598)."""

from torch import Tensor


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """unconditional + scale * (conditional - unconditional)."""
    return unconditional + scale * (conditional - unconditional)


def needs_guidance(scale: float) -> bool:
    """At a scale of 1 or less the official pipeline follows the prompt alone; so do we, at half the cost."""
    return scale > 1.0

"""What recomputing one golden entry can lead to."""

from dataclasses import dataclass

from torch import Tensor

MODULE_TOLERANCE = 2e-5
PIPELINE_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Computed:
    """Our value for the entry. `tolerance` is the largest error allowed, relative to the golden's absmax.

    Two equivalent runs of the official code differ by up to 4e-6 in one module, and by up to 1e-5 end to end.
    Integers and uint8 frames have rules of their own (compare.py).
    """

    tensor: Tensor
    tolerance: float = MODULE_TOLERANCE


@dataclass(frozen=True)
class Given:
    """The entry is an input of others."""


@dataclass(frozen=True)
class Skipped:
    """The entry is not compared, because of `reason`."""

    reason: str


Answer = Computed | Given | Skipped

GIVEN = Given()
UNKNOWN = Skipped("unknown entry")
NO_GRAPH = Skipped("no graph of its own")

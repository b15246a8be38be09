"""The exchanges between ranks that the network and the loop need: by torch.distributed in collectives.py, by none in
OneRank."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Pending(Protocol):
    """A collective under way."""

    def wait(self) -> Tensor:
        """Waits for the result."""
        ...


class Communicator(Protocol):
    """One rank's view of its layout: its sizes and indices, and the collectives that the loop needs.

    Axes: H heads of this rank's tensor slice, N all video tokens, n this rank's tokens (`counts` holds every rank's n
    in the order of the sequence axis), C channels.
    """

    cfg: int
    cfg_index: int
    tp: int
    tp_index: int
    sp: int
    sp_index: int

    def sum_tp(self, partial: Tensor) -> Pending:
        """Sum over the tensor-parallel group, which starts at once, beside computation; may overwrite `partial`."""
        ...

    def to_heads(self, qkv: Tensor, counts: list[int]) -> Tensor:
        """All-to-all: [3, H, n, 128] of all heads for own tokens -> [3, H / sp, N, 128] of own heads for all tokens."""
        ...

    def to_tokens(self, out: Tensor, counts: list[int]) -> Tensor:
        """The way back: [N, H / sp * 128] -> [n, H * 128]."""
        ...

    def gather_tokens(self, own: Tensor, counts: list[int]) -> Tensor:
        """[n, C] of every rank of the sequence axis -> [N, C] on each."""
        ...

    def exchange_branches(self, own: Tensor) -> tuple[Tensor, Tensor]:
        """The velocities of both guidance branches, conditional first, the same bits on every rank."""
        ...

    def agree(self, value: int) -> int:
        """The leader's value, on every rank."""
        ...


@dataclass(frozen=True)
class Done:
    """A result that needs no waiting."""

    result: Tensor

    def wait(self) -> Tensor:
        return self.result


class OneRank:
    """The communicator of a rank that is alone: every sum is its own part, every exchange its own tensor."""

    cfg = tp = sp = 1
    cfg_index = tp_index = sp_index = 0

    def sum_tp(self, partial: Tensor) -> Pending:
        return Done(partial)

    def to_heads(self, qkv: Tensor, counts: list[int]) -> Tensor:
        return qkv.reshape(3, -1, sum(counts), qkv.shape[-1])

    def to_tokens(self, out: Tensor, counts: list[int]) -> Tensor:
        return out.reshape(sum(counts), -1)

    def gather_tokens(self, own: Tensor, counts: list[int]) -> Tensor:  # noqa: ARG002  # all tokens are its own
        return own

    def exchange_branches(self, own: Tensor) -> tuple[Tensor, Tensor]:
        raise RuntimeError(f"one rank computes both branches itself, got one of shape {list(own.shape)} to exchange")

    def agree(self, value: int) -> int:
        return value

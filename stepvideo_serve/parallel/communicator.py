"""What the model's code asks of the other ranks. Implemented over torch.distributed in parallel/collectives.py."""

from typing import Protocol

from torch import Tensor


class Pending(Protocol):
    """A collective under way."""

    def wait(self) -> Tensor:
        """The result, once it is there."""
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
        """Sum over the tensor-parallel group; `partial` is given away. Starts at once, and may overlap computation."""
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

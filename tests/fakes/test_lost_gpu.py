"""A CUDA error in a rank on the stub: the process that saw it ends, and the group goes on with another."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stepvideo_serve.errors import WorkerFailed
from stepvideo_serve.parallel.group import RankGroup
from tests.fakes.test_ranks_on_stub import denoised, ranks

Configured = Callable[..., Path]


@pytest.mark.parametrize(("layout", "rank"), [("single", 0), ("tp2", 1)])
def test_a_rank_whose_gpu_is_lost_ends(layout: str, rank: int, root: Path, configured: Configured) -> None:
    """TensorRT's refusal is no fault of the caller, and the next job has the bits of a group that lost nothing."""
    lost = {"generation": 1, "rank": rank, "enqueue": 12}
    with ranks(root, configured(layout), layout, lost=lost) as group:
        first = pids(group)
        with pytest.raises(WorkerFailed):
            denoised(group)
        found = denoised(group)
        assert group.generation == 2
        assert not first & pids(group)
        assert all(bool(torch.isfinite(latents).all()) for latents in found)


def pids(group: RankGroup) -> set[int]:
    return {*group.pids}

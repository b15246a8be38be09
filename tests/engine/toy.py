"""A small graph: its spec, its module, and inputs for it."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from stepvideo_serve.engine.spec import Dim, EngineSpec, TensorSpec

WIDTH = 8
VOCABULARY = 500

SPEC = EngineSpec(
    "toy",
    inputs=(
        TensorSpec("values", "float32", ("rows", WIDTH)),
        TensorSpec("ids", "int64", ("rows",)),
        TensorSpec("patches", "float32", (1, "2*columns", 3)),
        TensorSpec("gain", "float32", (WIDTH,)),
    ),
    outputs=(
        TensorSpec("mixed", "float32", ("rows", WIDTH)),
        TensorSpec("doubled", "float32", ("2*rows",)),
        TensorSpec("halves", "float32", ("columns", 6)),
        TensorSpec("gain_out", "float32", (WIDTH,)),
    ),
    dims={"rows": Dim(2, 4, 16), "columns": Dim(2, 3, 9)},
)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.table = nn.Embedding(VOCABULARY, WIDTH)

    def forward(self, values: Tensor, ids: Tensor, patches: Tensor, gain: Tensor) -> tuple[Tensor, ...]:
        mixed = self.linear(values * gain) + self.table(ids)
        sums = mixed.sum(-1)
        return mixed, torch.cat([sums, -sums]), patches.reshape(-1, 6), gain


@dataclass(frozen=True)
class Graph:
    spec: EngineSpec
    module: nn.Module
    onnx_path: Path


def toy_inputs(rows: int, columns: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "values": torch.randn(rows, WIDTH, generator=generator),
        "ids": torch.randint(VOCABULARY, (rows,), generator=generator),
        "patches": torch.randn(1, 2 * columns, 3, generator=generator),
        "gain": torch.rand(WIDTH, generator=generator),
    }

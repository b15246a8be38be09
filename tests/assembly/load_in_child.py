"""Loads a folder of weights as one network, or a part of it, and prints how much memory that took at its peak (Linux).

python -m tests.assembly.load_in_child FOLDER DTYPE whole|rows|sections|columns
"""

import json
import sys
from pathlib import Path

import torch
from torch import nn

from stepvideo_serve.assembly.checkpoint import load_module
from stepvideo_serve.weights.cuts import REPLICATED, ShardPlan, Split, TensorPart
from stepvideo_serve.weights.files import open_weights

PAGE_BYTES = 4096
SIDE = 4096
PART = TensorPart(3, 4)
SPLITS = {
    "rows": Split(0, SIDE),
    "sections": Split(0, SIDE // 4, (SIDE * 3 // 4, SIDE // 4)),
    "columns": Split(1, SIDE),
}


class Stack(nn.Module):
    """Square matrices of 32 MiB in bf16, or a part of each."""

    def __init__(self, layers: int, rows: int, columns: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(columns, rows, bias=False) for _ in range(layers))


def peak_bytes() -> int:
    """The largest resident size so far, mapped file pages included."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) * 1024


def main(folder: Path, dtype: torch.dtype, how: str) -> None:
    torch.set_num_threads(1)
    files = open_weights(folder, rename=lambda key: key)
    plan = ShardPlan("a stack", {"layers.*.weight": SPLITS.get(how, REPLICATED)})
    cuts = plan.cuts(files.shapes, PART)
    cut = cuts.get("layers.0.weight")
    rows, columns = cut.shape((SIDE, SIDE)) if cut else (SIDE, SIDE)
    before = peak_bytes()
    module = load_module(lambda: Stack(len(files.shapes), rows, columns), files, dtype, cuts=cuts)
    for parameter in module.parameters():  # as a run of the network would touch every page
        parameter.view(-1)[:: PAGE_BYTES // parameter.itemsize].sum()
    loaded = sum(parameter.nbytes for parameter in module.parameters())
    print(json.dumps({"growth": peak_bytes() - before, "loaded": loaded}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), getattr(torch, sys.argv[2]), sys.argv[3])

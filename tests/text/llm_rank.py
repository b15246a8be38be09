"""One rank of Step-LLM split over processes: reads its slices, runs the prompt, writes the states.

python -m tests.text.llm_rank MODEL_FOLDER STORE_FILE RANK RANKS OUT_FILE LENGTH
"""

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.engine.runner import EagerRunner
from stepvideo_serve.parallel.collectives import Collectives
from stepvideo_serve.parallel.layout import Layout
from stepvideo_serve.text import segments
from stepvideo_serve.weights.cuts import TensorPart


def graphs_of(checkpoint: Checkpoint, part: TensorPart) -> dict[str, EagerRunner]:
    """This part's pieces of Step-LLM in fp32, as eager graphs."""
    config = checkpoint.llm_config
    runners = [EagerRunner(segments.llm_embed_spec(config, "float32"), checkpoint.llm_embed())]
    for i in range(config.num_layers):
        for half, module in (
            ("attn", checkpoint.llm_attention(i, part=part)),
            ("ff", checkpoint.llm_feed_forward(i, part=part)),
        ):
            runners.append(EagerRunner(segments.llm_half_spec(config, "float32", half, i), module))
    return {runner.spec.name: runner for runner in runners}


def token_ids(length: int, vocab_size: int) -> torch.Tensor:
    return torch.randint(vocab_size, (1, length), generator=torch.Generator().manual_seed(length))


def main(folder: Path, store: str, rank: int, ranks: int, out: Path, length: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    checkpoint = Checkpoint(folder)
    communicator = Collectives(Layout(tp=ranks), rank)
    graphs = graphs_of(checkpoint, TensorPart(rank, ranks))
    llm = segments.ShardedStepLLM(graphs, checkpoint.llm_config, communicator)
    states = llm(input_ids=token_ids(length, checkpoint.llm_config.vocab_size))["llm_states"]
    save_file({"llm_states": states}, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]), int(sys.argv[6]))

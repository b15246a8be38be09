"""Which processes of a server use a GPU, and which one."""

from collections.abc import Mapping
from dataclasses import dataclass

from stepvideo_serve.config import ServeConfig
from stepvideo_serve.errors import ConfigError
from stepvideo_serve.parallel.layout import Layout

TEXT, ENCODER, DECODER = "text_encoder", "vae_encoder", "vae_decoder"
SECTIONS: Mapping[str, str] = {TEXT: "text", ENCODER: "encoder", DECODER: "decoder"}
"""The models that hold a stage -> their sections of serve.toml."""
SERVER = "tritonserver"


def rank_process(rank: int) -> str:
    """How a ledger names the process of a rank."""
    return f"rank {rank}"


@dataclass(frozen=True)
class Placement:
    """Rank N is on GPU N. text, encoder, decoder: the GPUs of the models beside the ranks. Where several ranks decode,
    the decoder is theirs, and its model uses no GPU. llm_on_ranks: Step-LLM in slices on the ranks; its model keeps
    Hunyuan-CLIP."""

    layout: Layout
    llm_on_ranks: bool = False
    text: int = 0
    encoder: int = 0
    decoder: int = 0

    @classmethod
    def of(cls, config: ServeConfig) -> "Placement":
        """Raises ConfigError for a layout that is none, and for a GPU of a stage that is not to be had."""
        layout = Layout.parse(config.denoiser.layout)
        if layout.world_size > 1 and config.decoder.device:
            raise ConfigError(
                f'[decoder] device must be "" where several ranks decode, each on its own GPU, got '
                f'"{config.decoder.device}" with the layout {layout}: leave it out.'
            )
        text, encoder, decoder = (gpu_of(config, process) or 0 for process in SECTIONS)
        return cls(layout, config.text.on_ranks, text, encoder, decoder)

    @property
    def ranks_decode(self) -> bool:
        return self.layout.world_size > 1

    @property
    def processes(self) -> dict[str, int]:
        """Process -> its GPU; the server itself, which is on each of them, is left out."""
        stages = {TEXT: self.text, ENCODER: self.encoder, **({} if self.ranks_decode else {DECODER: self.decoder})}
        return {rank_process(rank): rank for rank in range(self.layout.world_size)} | stages

    @property
    def shared(self) -> frozenset[int]:
        """The GPUs that models beside the ranks use, and the first, which the server uses in any case."""
        return frozenset({0, *(gpu for process, gpu in self.processes.items() if process in SECTIONS)})

    @property
    def gpus(self) -> list[int]:
        """All that are used, in order."""
        return sorted(set(self.processes.values()))


def gpu_of(config: ServeConfig, process: str) -> int | None:
    """The GPU that serve.toml gives a model that holds a stage; None where it gives none.
    Raises ConfigError where it gives one beside [model] device = "cpu"."""
    section = SECTIONS[process]
    device: str = getattr(config, section).device
    if device and config.model.device != "cuda":
        raise ConfigError(
            f'[{section}] device must be "" beside [model] device = "{config.model.device}", got "{device}": leave it '
            "out, or serve on GPUs."
        )
    return int(device.removeprefix("cuda:")) if device else None

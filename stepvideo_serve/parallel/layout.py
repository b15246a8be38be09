"""How the ranks of a group share one request: guidance branches x tensor parallelism x sequence parallelism.

Written "cfg2.tp4", "tp8", "cfg2.sp4", ... (parts left out are 1), or "single". Ranks that exchange most are neighbours:
rank = (cfg index * sp + sp index) * tp + tp index.
"""

import re
from dataclasses import dataclass, replace

from stepvideo_serve.errors import ConfigError

SIZES = {"cfg": (1, 2), "tp": (1, 2, 4, 8), "sp": (1, 2, 4, 8)}


@dataclass(frozen=True)
class Coordinates:
    """A rank's place along each axis of its layout."""

    cfg: int
    tp: int
    sp: int


@dataclass(frozen=True)
class Layout:
    """cfg in 1, 2 guidance branches side by side; tp in 1, 2, 4, 8 slices of heads and hidden channels; sp in 1, 2, 4,
    8 slices of the tokens (Ulysses)."""

    cfg: int = 1
    tp: int = 1
    sp: int = 1

    @classmethod
    def parse(cls, text: str) -> "Layout":
        """Raises ConfigError for anything but the names in the module's docstring."""
        parts = [] if text == "single" else text.split(".")
        sizes: dict[str, int] = {}
        for part in parts:
            match = re.fullmatch(r"(cfg|tp|sp)([1248])", part)
            if match is None or match[1] in sizes or int(match[2]) not in SIZES[match[1]]:
                raise ConfigError(
                    'layout must be "single" or parts of cfg1|2, tp1|2|4|8, sp1|2|4|8 such as "cfg2.tp4", '
                    f"got {text!r}: correct {part!r}."
                )
            sizes[match[1]] = int(match[2])
        return cls(**sizes)

    def __str__(self) -> str:
        parts = [f"{name}{size}" for name in SIZES if (size := getattr(self, name)) > 1]
        return ".".join(parts) or "single"

    @property
    def world_size(self) -> int:
        return self.cfg * self.tp * self.sp

    @property
    def of_branch(self) -> "Layout":
        """How the ranks of one guidance branch share its work: all that engines depend on."""
        return replace(self, cfg=1)

    def coordinates(self, rank: int) -> Coordinates:
        outer, tp = divmod(rank, self.tp)
        cfg, sp = divmod(outer, self.sp)
        return Coordinates(cfg, tp, sp)

    def group(self, axis: str, rank: int) -> tuple[int, ...]:
        """The ranks that differ from `rank` in `axis` ("cfg", "tp" or "sp") only, in the order of that axis."""
        own = self.coordinates(rank)
        others = {name: getattr(own, name) for name in SIZES if name != axis}
        return tuple(
            r for r in range(self.world_size) if all(getattr(self.coordinates(r), n) == v for n, v in others.items())
        )

    def check(self, num_heads: int, llm_groups: int | None = None) -> None:
        """Raises ConfigError unless heads (and the LLM's key/value groups) divide."""
        if num_heads % (self.tp * self.sp):
            raise ConfigError(
                f"layout {self} must divide the DiT's {num_heads} heads by tp x sp = {self.tp * self.sp}, "
                "it does not: choose a smaller tp or sp."
            )
        if llm_groups is not None and llm_groups % self.tp:
            raise ConfigError(
                f"layout {self} must divide Step-LLM's {llm_groups} key/value groups by tp = {self.tp}, it does not: "
                "choose a smaller tp, or leave Step-LLM whole."
            )

    def check_devices(self, devices: int) -> None:
        """Raises ConfigError unless there is a GPU for each rank."""
        if devices < self.world_size:
            raise ConfigError(
                f"layout {self} needs {self.world_size} GPUs, found {devices}: see nvidia-smi and "
                "CUDA_VISIBLE_DEVICES, or choose a smaller layout."
            )

    def check_tokens(self, tokens: int) -> None:
        """Raises ConfigError when a rank would get no token. Uneven counts are fine."""
        if tokens < self.sp:
            raise ConfigError(f"layout {self} needs at least {self.sp} tokens, got {tokens}: choose a smaller sp.")


SINGLE = Layout()


def part_folder(layout: Layout, tp_index: int) -> str:
    """Where an engine directory keeps the pieces of one tensor-parallel rank: "tp0of4"."""
    return f"tp{tp_index}of{layout.tp}"


def split_evenly(total: int, parts: int) -> list[int]:
    """Sizes of `parts` neighbouring slices that differ by at most one, larger ones first."""
    size, rest = divmod(total, parts)
    return [size + (i < rest) for i in range(parts)]

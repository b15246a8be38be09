"""The model `dit_denoiser` of a test's own model repository, one of whose threads a test can have die."""

import os
from pathlib import Path
from typing import Any

from stepvideo_serve.parallel.group import RankGroup
from stepvideo_serve.serving.denoiser import DenoiserModel

TRIGGER = "STEPVIDEO_TEST_TRIGGER"  # the environment variable that names the file


class PlantedDenoiser(DenoiserModel):
    """Its thread "rank-watch" dies when the trigger's file is there; the file is gone then, and kills no other."""

    def initialize(self, args: dict[str, str]) -> None:
        super().initialize(args)
        self._ranks_watch._group = Planted(self._group, Path(os.environ[TRIGGER]))  # type: ignore[assignment]


class Planted:
    """A group of ranks that raises once in whoever asks how its ranks are."""

    def __init__(self, group: RankGroup, trigger: Path) -> None:
        self._planted_group, self._trigger = group, trigger

    def __getattr__(self, name: str) -> Any:
        if name == "healthy" and self._trigger.exists():
            self._trigger.unlink()
            raise OverflowError("planted")
        return getattr(self._planted_group, name)

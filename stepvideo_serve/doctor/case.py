"""What the doctor looks at: a configuration, how the server would be started, and this process's environment."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from stepvideo_serve.config import ServeConfig
from stepvideo_serve.launch.options import ServerOptions
from stepvideo_serve.parallel.layout import Layout


@dataclass(frozen=True)
class Case:
    """path: the configuration's file; options: those of `serve`; environ: the environment's variables."""

    path: Path
    config: ServeConfig
    options: ServerOptions
    environ: Mapping[str, str]

    @property
    def layout(self) -> Layout:
        """Raises ConfigError."""
        return Layout.parse(self.config.denoiser.layout)

    @property
    def wants_gpus(self) -> bool:
        return self.config.model.device == "cuda"

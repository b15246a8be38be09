"""Looks up a request's preset in the price files; where the preset has no price there, warns or refuses, as [pricing]
says."""

from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.assembly.runners import served_checkpoint
from stepvideo_serve.config import ServeConfig
from stepvideo_serve.errors import InvalidRequest
from stepvideo_serve.planning.evaluations import known_evaluations
from stepvideo_serve.planning.prices import PriceBook, Setting
from stepvideo_serve.request import GenerationRequest
from stepvideo_serve.request.presets import Preset, preset_name


class Pricing:
    """The prices of one served checkpoint and precision. `checkpoint` is its identity."""

    def __init__(self, book: PriceBook, checkpoint: str, precision: str, require: bool) -> None:
        self._book, self._checkpoint, self._precision, self._require = book, checkpoint, precision, require

    @classmethod
    def of(cls, config: ServeConfig) -> "Pricing":
        """Reads the price files, and with any the checkpoint's identity: that of the graphs' manifest; without graphs
        the weights are hashed, which takes long for large ones. Raises SetupError."""
        book = PriceBook.load(config.pricing.files)
        checkpoint = ""
        if config.pricing.files:
            eager = config.model.backend == "eager"
            checkpoint = Checkpoint(config.model.dir).identity if eager else served_checkpoint(config)
        return cls(book, checkpoint, config.model.precision, config.pricing.require)

    def warning(self, request: GenerationRequest, preset: Preset) -> str | None:
        """A sentence where the preset has no price for this request; None where there is one, or nothing to pay.

        Raises InvalidRequest instead of the sentence where prices are required.
        """
        if known_evaluations(preset, request.steps) == request.steps and preset.guides_always:
            return None
        setting = Setting(
            request.num_frames, request.height, request.width, request.steps, request.cfg_scale, request.time_shift
        )
        if self._book.find(self._checkpoint, self._precision, preset, setting) is not None:
            return None
        asked = (
            f"QUALITY {preset_name(request.quality)} has no price on this server for {request.num_frames} frames of "
            f"{request.height}x{request.width}, STEPS {request.steps}, CFG_SCALE {request.cfg_scale:g} and TIME_SHIFT "
            f"{request.time_shift:g}"
        )
        if self._require:
            raise InvalidRequest(f"{asked}, which the server requires: ask for a priced one, or for exact.")
        return f"{asked}: nobody has measured what it costs; see docs/quality.md."

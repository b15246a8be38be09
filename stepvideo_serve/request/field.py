"""One input of the models that callers see: what it is called, what it accepts, who needs it."""

from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from stepvideo_serve.errors import InvalidRequest
from stepvideo_serve.request.limits import RequestDefaults, RequestLimits
from stepvideo_serve.request.rules import Rule, as_fp32, shortened

DType = Literal["BYTES", "INT32", "INT64", "FP32"]
Need = Literal["request", "quote", "ranks", "client"]
Setting = int | float | str

_NUMPY: Final[dict[str, type[np.generic]]] = {
    "BYTES": np.object_,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP32": np.float32,
}
_JSON: Final[dict[str, str]] = {"BYTES": "text", "INT32": "an integer", "INT64": "an integer", "FP32": "a number"}


class Default(Enum):
    """Where the value of an absent input comes from, if it is not a constant."""

    REQUIRED = "required"
    CONFIGURED = "[defaults] of the configuration"
    RANDOM = "random"


@dataclass(frozen=True)
class Field:
    """One input.

    name       of the tensor
    attribute  of GenerationRequest, and the client's option
    dtype      Triton's name of the type; the shape is [1], but that of Noise, which has four dimensions
    default    a constant, None for nothing, or where the value comes from
    rule       what is accepted
    needs      who needs the input: "request": `ti2v` and `ti2v_unary`; "quote": `ti2v_quote`; "ranks": whoever
               denoises; "client": the command line, as an option
    help       what the input means, for the command line and the documents
    flag       the option's name on the command line, if it is not that of the attribute
    metavar    what stands for its value there
    """

    name: str
    attribute: str
    dtype: DType
    default: Default | Setting | None
    rule: Rule
    needs: tuple[Need, ...]
    help: str
    flag: str = ""
    metavar: str = "N"

    @property
    def option(self) -> str:
        """The option's name on the command line, of those that a "client" needs."""
        return self.flag or f"--{self.attribute.replace('_', '-')}"

    def default_in(self, defaults: RequestDefaults) -> Any:
        """The value that stands in for an absent input. Not for those that are required or random."""
        return getattr(defaults, self.attribute) if self.default is Default.CONFIGURED else self.default

    def read(self, array: NDArray[Any], limits: RequestLimits) -> Any:
        """The value of a tensor of shape [1], inside the limits. Raises InvalidRequest."""
        if array.dtype != np.dtype(_NUMPY[self.dtype]) or array.shape != (1,):
            raise InvalidRequest(
                f"{self.name} must be {self.dtype} of shape [1], got {array.dtype} of shape {list(array.shape)}: "
                f"send one {self.dtype} value."
            )
        value = array[0] if self.dtype == "BYTES" else array[0].item()
        if self.dtype == "BYTES" and not isinstance(value, bytes):
            raise InvalidRequest(f"{self.name} must hold bytes, got {type(value).__name__}: send it as a BYTES tensor.")
        return self.rule.check(self.name, value, limits)

    def read_setting(self, value: object, limits: RequestLimits) -> Setting:
        """The value that came as JSON: a number, or text for BYTES. Raises InvalidRequest."""
        read: Any
        if self.dtype == "BYTES" and isinstance(value, str):
            read = value.encode(errors="surrogatepass")
        elif self.dtype == "FP32" and isinstance(value, int | float) and not isinstance(value, bool):
            read = as_fp32(value)
        elif self.dtype in ("INT32", "INT64") and isinstance(value, int) and not isinstance(value, bool):
            read = value
        else:
            kind = _JSON[self.dtype]
            raise InvalidRequest(f"{self.attribute} must be {kind}, got {shortened(value)}: send {kind}.")
        checked: Setting = self.rule.check(self.attribute, read, limits)
        return checked

"""The boundary around the internal models: only the models of this server may call them.

Triton tells nobody whether a request comes from another model or from a caller. So the launcher makes a random token at
every start and hands it to the models in the environment; a call between models carries it as a parameter, and an
internal model answers nobody else. Whoever can read the environment of the server's processes is its own user.
"""

import hmac
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field

from stepvideo_serve.errors import InvalidRequest, SetupError

VARIABLE = "STEPVIDEO_BOUNDARY_TOKEN"
PARAMETER = "boundary_token"
INTERNAL_MODELS = ("text_encoder", "vae_encoder", "dit_denoiser", "vae_decoder")
TOKEN_BYTES = 32
LEAST_LENGTH = 32  # characters: what somebody sets by hand must not be guessed either


def new_token() -> str:
    """For one start of a server."""
    return secrets.token_urlsafe(TOKEN_BYTES)


@dataclass(frozen=True)
class Boundary:
    """What the models of one server know of each other."""

    _token: str = field(repr=False)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> "Boundary":
        """Raises SetupError in a process that was not started by the launcher."""
        token = environ.get(VARIABLE, "")
        if len(token) < LEAST_LENGTH:
            raise SetupError(
                f"{VARIABLE} must hold the token that keeps strangers from the internal models, at least {LEAST_LENGTH}"
                f" characters, found {len(token)}: start the server with `python -m stepvideo_serve serve`."
            )
        return cls(token)

    @property
    def parameters(self) -> dict[str, str]:
        """What a request to an internal model carries."""
        return {PARAMETER: self._token}

    def check(self, model: str, parameters: Mapping[str, object]) -> None:
        """Raises InvalidRequest for a request that no model of this server has sent. Takes the same time for every
        token of one length."""
        given = str(parameters.get(PARAMETER, "")).encode(errors="backslashreplace")
        if not hmac.compare_digest(given, self._token.encode()):
            raise InvalidRequest(
                f"The caller of {model} must be a model of this server, got a request from outside: call ti2v, "
                "ti2v_unary, ti2v_quote or ti2v_cancel."
            )

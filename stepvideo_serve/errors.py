"""Every error that this package raises on purpose.

StepVideoError
├── RequestError                  the answer to one request; the server goes on
│   ├── InvalidRequest            INVALID_ARGUMENT
│   ├── QueueFull                 RESOURCE_EXHAUSTED
│   ├── ServiceUnavailable        UNAVAILABLE
│   ├── DeadlineExceeded          DEADLINE_EXCEEDED
│   ├── RequestCancelled          CANCELLED
│   ├── WorkerFailed              INTERNAL: the group of ranks died or failed while it ran the request
│   └── BadOutput                 INTERNAL: what was computed must not be handed out, as [gates] says
├── DeviceLost                    INTERNAL: CUDA fails for ever in this process, which ends for that reason
└── SetupError                    something must be put right before serving (or before a tool can run)
    ├── ConfigError               serve.toml
    ├── CheckpointError           a missing, truncated or mismatched weight file
    ├── EngineError               an engine, its inputs or its manifest
    │   └── MemoryShortage        the GPU has less free memory than the engines need
    └── ExportError               export, verification

A message is one sentence that says what was expected, what came, and what to do.
"""

from typing import ClassVar


class StepVideoError(Exception):
    """Base of all errors of this package; `code` is the canonical gRPC name of the status."""

    code: ClassVar[str] = "INTERNAL"


class RequestError(StepVideoError):
    """The request cannot be answered with a video."""


class InvalidRequest(RequestError):
    """An input is missing, malformed or out of range."""

    code = "INVALID_ARGUMENT"


class QueueFull(RequestError):
    """Too many requests are waiting."""

    code = "RESOURCE_EXHAUSTED"


class ServiceUnavailable(RequestError):
    """The service cannot take requests at the moment."""

    code = "UNAVAILABLE"


class DeadlineExceeded(RequestError):
    """The request's TIMEOUT_S ran out."""

    code = "DEADLINE_EXCEEDED"


class RequestCancelled(RequestError):
    """The caller cancelled the request."""

    code = "CANCELLED"


class WorkerFailed(RequestError):
    """A rank process died or raised while it ran the request."""


class BadOutput(RequestError):
    """What was computed is not finite, or not a video that [gates] lets through."""


class DeviceLost(StepVideoError):
    """Every later call of CUDA or NCCL fails in this process: it must end, and a new one take its place."""

    exit_status: ClassVar[int] = 70
    """With which a process ends for this reason; EX_SOFTWARE of sysexits.h, which nothing else here uses."""


class SetupError(StepVideoError):
    """The installation, configuration or model files need attention."""


class ConfigError(SetupError):
    """The configuration file is wrong."""


class CheckpointError(SetupError):
    """A weight file is missing, truncated, or does not fit the model."""


class EngineError(SetupError):
    """An engine is missing, does not match, or was called with wrong inputs."""


class MemoryShortage(EngineError):
    """The GPU has less free memory than the engines need: for good, or until what has just ended gives back its own."""


class ExportError(SetupError):
    """A graph could not be exported or does not agree with its reference."""

"""The package `stepvideo_kernels` is optional: only fused operators and engines with plugins need it."""

from importlib.util import find_spec

from stepvideo_serve.errors import SetupError

KERNELS_PACKAGE = "stepvideo_kernels"


def require_kernels(who: str) -> None:
    """Raises SetupError unless the package can be imported; `who` needs it, and begins the sentence."""
    if find_spec(KERNELS_PACKAGE) is None:
        raise SetupError(
            f"{who} needs the package {KERNELS_PACKAGE}, which was not found: put the folder kernels of the checkout "
            "on PYTHONPATH."
        )

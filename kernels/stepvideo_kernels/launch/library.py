"""Loads built kernels and launches them through the CUDA driver; nothing is compiled and no torch is needed.

    library = KernelLibrary(folder, sm=90)
    kernel = library.find("adaln_modulate", "residual-bf16", WIDTH=6144)
    kernel.launch(grid, stream, {"x_ptr": address, "tokens": 37_944, "eps": 1e-5, ...})

Everything is loaded and its attributes are set by `find`, so that a launch may be captured into a CUDA graph.
A launch needs a current CUDA context (TensorRT and torch make one) and an NVIDIA driver; the rest of this module, and
so all that packs parameters, does not.
"""

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepvideo_kernels.compile.binaries import Binary
from stepvideo_kernels.kernel_spec import Constant
from stepvideo_kernels.launch.parameters import Argument, Driver, pack
from stepvideo_serve.errors import EngineError


@dataclass(frozen=True)
class Kernel:
    """A loaded kernel."""

    binary: Binary
    handle: Any
    driver: Driver

    def launch(
        self, grid: tuple[int, int, int], stream: int, arguments: Mapping[str, Argument], scratch: int = 0
    ) -> None:
        """Queues it on a stream (its handle as an integer); an empty grid is no launch."""
        if 0 in grid:
            return
        self.driver.launch(self.handle, self.binary, grid, stream, pack(self.binary, arguments, self.driver, scratch))

    def scratch_bytes(self, grid: tuple[int, int, int]) -> int:
        """Device memory to pass as `scratch`, aligned to binary.scratch_alignment; one launch at a time may use it."""
        blocks = grid[0] * grid[1] * grid[2] * self.binary.num_ctas
        return blocks * self.binary.scratch_bytes


class KernelLibrary:
    """The kernels of a folder for one architecture: those for production, or all of one `tiling` (its label)."""

    def __init__(
        self,
        folder: Path,
        sm: int,
        driver: Driver | None = None,
        tiling: str | None = None,
        described: Mapping[str, str] | None = None,
    ) -> None:
        """Reads all descriptions; with `described`, hashes by file name, these files only, and compares them. Raises
        EngineError when the folder has no kernel for the architecture, or a description is bad or another one."""
        names = [path.name for path in folder.glob("*.json")] if described is None else list(described)
        ours = sorted(fnmatch.filter(names, f"*.sm{sm}.*.json"))
        binaries = [Binary.load(folder / name, None if described is None else described[name]) for name in ours]
        self._folder = folder
        self._sm = sm
        self._driver = driver
        self._binaries = [
            binary for binary in binaries if (binary.chosen if tiling is None else binary.name.endswith(f".{tiling}"))
        ]
        self._loaded: dict[str, Kernel] = {}
        if not self._binaries:
            raise EngineError(f"{folder} must hold kernels for SM {sm}, it has none: run `make kernels`.")

    def find(self, op: str, variant: str, **constants: Constant) -> Kernel:
        """The kernel of an op and variant that was built with these constants; loads it the first time."""
        found = [
            binary
            for binary in self._binaries
            if (binary.op, binary.variant) == (op, variant)
            and all(binary.constexprs.get(name) == value for name, value in constants.items())
        ]
        if len(found) != 1:
            wanted = " ".join([op, variant, *(f"{name}={value}" for name, value in constants.items())])
            raise EngineError(
                f"{self._folder} must hold one kernel {wanted} for SM {self._sm}, it has {len(found)}: "
                "build it with `make kernels`."
            )
        return self._load(found[0])

    def _load(self, binary: Binary) -> Kernel:
        if binary.name not in self._loaded:
            if self._driver is None:
                from stepvideo_kernels.launch.cuda_driver import CudaDriver

                self._driver = CudaDriver()
            handle = self._driver.load(binary, binary.read_cubin(self._folder))
            self._loaded[binary.name] = Kernel(binary, handle, self._driver)
        return self._loaded[binary.name]

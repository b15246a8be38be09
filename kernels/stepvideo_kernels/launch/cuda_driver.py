"""The CUDA driver calls that launching takes, by way of cuda.bindings."""

import ctypes
from collections.abc import Mapping
from typing import Any

from stepvideo_kernels.compile.binaries import TENSOR_MAP_BYTES, Binary
from stepvideo_kernels.launch.parameters import PackedParameters, TensorView
from stepvideo_serve.errors import EngineError

_MAX_PORTABLE_CLUSTER = 8
# The compiler numbers the element types of tensor maps as the device does; the driver's numbers differ for these.
_DEVICE_TO_DRIVER_TYPE: Mapping[int, int] = {8: 10, 9: 8, 10: 9}


class CudaDriver:
    """Needs the package cuda-bindings and an NVIDIA driver; every failure is an EngineError."""

    def __init__(self) -> None:
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise EngineError(
                f"Launching kernels needs cuda.bindings, which is missing ({error}): pip install cuda-bindings==13.5.0."
            ) from None
        self._cuda = driver
        self._libraries: list[Any] = []
        try:
            self._call("cuInit", 0)
        except RuntimeError as error:  # how cuda.bindings says that there is no driver
            raise EngineError(f"Launching kernels needs an NVIDIA driver, which is missing: {error}") from None

    def current_sm(self) -> int:
        """The architecture of the current context's device, e.g. 90."""
        device = self._call("cuCtxGetDevice")
        names = self._cuda.CUdevice_attribute
        parts = (names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)
        major, minor = (int(self._call("cuDeviceGetAttribute", part, device)) for part in parts)
        return 10 * major + minor

    def load(self, binary: Binary, code: bytes) -> Any:
        """A kernel of a cubin; its shared memory is granted for the current device."""
        cuda = self._cuda
        library = self._call("cuLibraryLoadData", code, [], [], 0, [], [], 0)
        self._libraries.append(library)  # a kernel is gone when its library is
        kernel = self._call("cuLibraryGetKernel", library, binary.entry.encode())
        for index, slot in enumerate(binary.slots):
            _, size = self._call("cuKernelGetParamInfo", kernel, index)
            if size != slot.size:
                raise EngineError(
                    f"{binary.name} must have a parameter {index} of {slot.size} bytes, the driver sees {size}: "
                    "build it again."
                )
        device = self._call("cuCtxGetDevice")
        attributes = cuda.CUfunction_attribute
        shared = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self._call("cuKernelSetAttribute", shared, binary.shared_bytes, kernel, device)
        if binary.num_ctas > _MAX_PORTABLE_CLUSTER:
            large = attributes.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
            self._call("cuKernelSetAttribute", large, 1, kernel, device)
        return kernel

    def encode_tensor_map(self, view: TensorView, encoding: Mapping[str, Any]) -> bytes:
        """`encoding` is the compiler's choice of swizzle, element and block; the driver counts axes from the last."""
        cuda = self._cuda
        element_bytes = int(encoding["elem_size"])
        element_type = int(encoding["elem_type"])
        rank = len(view.shape)
        tensor_map = self._call(
            "cuTensorMapEncodeTiled",
            cuda.CUtensorMapDataType(_DEVICE_TO_DRIVER_TYPE.get(element_type, element_type)),
            rank,
            view.address,
            [cuda.cuuint64_t(size) for size in reversed(view.shape)],
            [cuda.cuuint64_t(stride * element_bytes) for stride in reversed(view.strides[:-1])],
            [cuda.cuuint32_t(size) for size in reversed(encoding["block_size"])],
            [cuda.cuuint32_t(1)] * rank,
            cuda.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            cuda.CUtensorMapSwizzle(int(encoding["swizzle"])),
            cuda.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            cuda.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
        return ctypes.string_at(tensor_map.getPtr(), TENSOR_MAP_BYTES)

    def launch(
        self, kernel: Any, binary: Binary, grid: tuple[int, int, int], stream: int, parameters: PackedParameters
    ) -> None:
        """cuLaunchKernelEx with the attributes that the compiler's own launcher sets."""
        cuda = self._cuda
        config = cuda.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid[0] * binary.num_ctas, grid[1], grid[2]
        config.blockDimX, config.blockDimY, config.blockDimZ = binary.threads, 1, 1
        config.sharedMemBytes = binary.shared_bytes
        config.hStream = cuda.CUstream(stream)
        attributes = self._attributes(binary)
        config.attrs = attributes
        config.numAttrs = len(attributes)
        self._call("cuLaunchKernelEx", config, kernel, parameters.address, 0)

    def _attributes(self, binary: Binary) -> list[Any]:
        identifiers = self._cuda.CUlaunchAttributeID
        attributes = []
        if binary.programmatic_launch:
            attribute = self._attribute(identifiers.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
            attribute.value.programmaticStreamSerializationAllowed = 1
            attributes.append(attribute)
        if binary.cooperative:
            attribute = self._attribute(identifiers.CU_LAUNCH_ATTRIBUTE_COOPERATIVE)
            attribute.value.cooperative = 1
            attributes.append(attribute)
        if binary.num_ctas > 1:
            attribute = self._attribute(identifiers.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION)
            cluster = attribute.value.clusterDim
            cluster.x, cluster.y, cluster.z = binary.num_ctas, 1, 1
            attributes.append(attribute)
            attribute = self._attribute(identifiers.CU_LAUNCH_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE)
            spread = self._cuda.CUclusterSchedulingPolicy.CU_CLUSTER_SCHEDULING_POLICY_SPREAD
            attribute.value.clusterSchedulingPolicyPreference = spread
            attributes.append(attribute)
        return attributes

    def _attribute(self, identifier: Any) -> Any:
        attribute = self._cuda.CUlaunchAttribute()
        attribute.id = identifier
        return attribute

    def _call(self, name: str, *arguments: Any) -> Any:
        """The results of a driver call, without its status."""
        status, *results = getattr(self._cuda, name)(*arguments)
        if int(status):
            raise EngineError(f"The CUDA driver's {name} must succeed, it said {status!s}: see the driver's log.")
        if len(results) > 1:
            return results
        return results[0] if results else None

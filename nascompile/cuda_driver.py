"""NVIDIA's driver library through ctypes: which GPU there is, memory on it and a stream. Nothing to install beside the driver.

Not executed on a GPU so far: the tests put a stand-in for the library in its place.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any

from nascompile.errors import UnsupportedError

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
MAJOR, MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR."""


@dataclass(frozen=True)
class Gpu:
    """The first GPU that the driver shows (CUDA_VISIBLE_DEVICES decides which that is)."""

    name: str
    compute_capability: str
    """`8.9`."""
    memory_bytes: int
    driver: str
    """Newest CUDA version the driver knows: `13.0`."""


def unavailable() -> str:
    """Why there is no CUDA device; empty if there is one."""
    if library() is None:
        return f"no CUDA device: the driver library {LIBRARY} is not installed"
    try:
        count = ctypes.c_int()
        _call("cuInit", 0)
        _call("cuDeviceGetCount", ctypes.byref(count))
    except UnsupportedError as error:
        return f"no CUDA device: {error.message}"
    return "" if count.value else "no CUDA device: the driver shows none"


def gpu() -> Gpu:
    """What the first GPU is; UnsupportedError if there is none."""
    _device()
    name, memory, version = ctypes.create_string_buffer(128), ctypes.c_size_t(), ctypes.c_int()
    _call("cuDeviceGetName", name, len(name), 0)
    _call("cuDeviceTotalMem_v2", ctypes.byref(memory), 0)
    _call("cuDriverGetVersion", ctypes.byref(version))
    capability = []
    for attribute in (MAJOR, MINOR):
        value = ctypes.c_int()
        _call("cuDeviceGetAttribute", ctypes.byref(value), attribute, 0)
        capability.append(str(value.value))
    return Gpu(
        name=name.value.decode(errors="replace"), compute_capability=".".join(capability), memory_bytes=memory.value,
        driver=f"{version.value // 1000}.{version.value % 1000 // 10}",
    )  # fmt: skip


def free_bytes() -> int:
    """Bytes that can still be allocated on the GPU."""
    _enter()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    _call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    return free.value


class Stream:
    """Work in order, and copies between NumPy arrays and device memory."""

    def __init__(self) -> None:
        _enter()
        stream = ctypes.c_void_p()
        _call("cuStreamCreate", ctypes.byref(stream), 0)
        self.handle = int(stream.value or 0)

    def enter(self) -> None:
        """Make the device current in the calling thread; before anything else a thread does with the stream."""
        _enter()

    def allocate(self, size: int) -> int:
        """Address of new device memory of at least `size` bytes."""
        address = ctypes.c_uint64()
        _call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(size, 1)))
        return address.value

    def free(self, address: int) -> None:
        _call("cuMemFree_v2", ctypes.c_uint64(address))

    def upload(self, address: int, array: Any) -> None:
        """Copy a contiguous array to the device; it must stay unchanged until `synchronize`."""
        _call("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(address), ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes), self._c)

    def download(self, array: Any, address: int) -> None:
        """Copy device memory into a contiguous array, filled after `synchronize`."""
        _call("cuMemcpyDtoHAsync_v2", ctypes.c_void_p(array.ctypes.data), ctypes.c_uint64(address), ctypes.c_size_t(array.nbytes), self._c)

    def synchronize(self) -> None:
        """Wait until all work of the stream is done; UnsupportedError for what went wrong in it."""
        _call("cuStreamSynchronize", self._c)

    @property
    def _c(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.handle)


@cache
def library() -> Any:
    """The driver library; None where there is none."""
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError:
        return None


def _device() -> None:
    if reason := unavailable():
        raise UnsupportedError(reason)


@cache
def _context() -> ctypes.c_void_p:
    """The first GPU's primary context, which runtimes use as well."""
    _device()
    context = ctypes.c_void_p()
    _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
    return context


def _enter() -> None:
    """Make the context current in this thread."""
    _call("cuCtxSetCurrent", _context())


def _call(name: str, *arguments: Any) -> None:
    if status := getattr(library(), name)(*arguments):
        text = ctypes.c_char_p()
        library().cuGetErrorString(status, ctypes.byref(text))
        raise UnsupportedError(f"CUDA driver: {(text.value or b'unknown error').decode(errors='replace')} ({name}: {status})")

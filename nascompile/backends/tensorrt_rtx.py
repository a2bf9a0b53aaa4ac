"""TensorRT-RTX: TensorRT's network and builder, compiling ahead of time for a named GPU generation with no GPU present."""

from __future__ import annotations

from typing import Any

from nascompile import cuda_driver
from nascompile.backends.tensorrt import CAPABILITY, TensorRt, settings_of
from nascompile.errors import UnsupportedError
from nascompile.records import Target


class TensorRtRtx(TensorRt):
    name = "tensorrt_rtx"
    title = "TensorRT-RTX"
    modules = ("tensorrt_rtx", "tensorrt_rtx_bindings")
    minimum = (1, 5)
    install = "pip install 'nascompile[tensorrt]'"

    def unbuildable(self, target: Target) -> str:
        """Needs the library, and a compute capability that it knows."""
        if reason := self._missing():
            return reason
        wanted, allowed = _wanted(target), self.capabilities()
        if not wanted:
            return f"the device's profile names no {CAPABILITY}; {self.title} builds for {', '.join(allowed)}"
        return "" if wanted in allowed else f"{self.title} does not build for compute capability {wanted}, only for {', '.join(allowed)}"

    def capabilities(self) -> tuple[str, ...]:
        """Compute capabilities it builds for, ascending."""
        names = [name[2:] for name in self.library().ComputeCapability.__members__ if name.startswith("SM")]
        return tuple(f"{n // 10}.{n % 10}" for n in sorted(map(int, names)))

    def _aim(self, trt: Any, config: Any, target: Target) -> None:
        config.num_compute_capabilities = 1
        if not config.set_compute_capability(getattr(trt.ComputeCapability, "SM" + _wanted(target).replace(".", "")), 0):
            raise UnsupportedError(f"{self.title} refuses compute capability {_wanted(target)}")


def _wanted(target: Target) -> str:
    """Compute capability to build for: the target's, or that of the GPU here; empty if there is neither."""
    named = settings_of(target).get(CAPABILITY, "")
    return named or ("" if cuda_driver.unavailable() else cuda_driver.gpu().compute_capability)


PLUGIN = TensorRtRtx()

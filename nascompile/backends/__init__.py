"""A backend: which forms and precisions it takes, how to build an engine's graph files, how to load and run them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from nascompile.records import Precision, Target


class Runner(Protocol):
    """A loaded engine: NumPy in, NumPy out."""

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]: ...


class Backend(Protocol):
    name: str
    accepts: Literal["onnx", "torch", "hf_folder", "program"]
    """The form that lowering hands over; `program` is `nascompile.mcu.program.Program`."""
    width_multiple: int
    """Sliced widths are multiples of this."""
    passes: tuple[str, ...]
    """Passes of `lowering.PASSES` that this backend wants, beyond those every backend gets."""
    tunable: tuple[tuple[str, tuple[str, ...]], ...]
    """Session settings worth trying: (name, values), first the value that holds where a session does not say."""
    rounding: tuple[tuple[str, tuple[str, ...]], ...]
    """The same for settings that round floats another way: worth trying where integers round far more."""

    def unavailable(self) -> str:
        """Why this backend cannot run here; empty if it can."""

    def supports(self, precision: Precision) -> str:
        """Why a precision cannot be lowered; empty if it can."""

    def versions(self) -> tuple[tuple[str, str], ...]:
        """(package, version) that decide speed and numbers."""

    def session(self) -> tuple[tuple[str, str], ...]:
        """Default session settings, sorted; they become part of the target."""

    def build(self, form: Any, target: Target, folder: Path) -> tuple[str, ...]:
        """Write the graph files into `folder`; their names."""

    def load(self, folder: Path, graphs: tuple[str, ...], target: Target) -> Runner:
        """A runner with the target's threads and session settings applied."""


@runtime_checkable
class CrossCompiler(Protocol):
    """What a backend has besides if it also builds for devices that are not here. Such an engine is built, not run."""

    counterparts: Mapping[str, Precision]
    """Name of a precision candidates are searched with ▸ what stands for it here."""
    unrun_remark: str
    """What the files of an engine that was never run lack."""

    def unbuildable(self, target: Target) -> str:
        """Why no engine can be built here for the target; empty if one can."""

    def unrunnable(self, target: Target) -> str:
        """Why an engine for the target cannot run here; empty if it can."""

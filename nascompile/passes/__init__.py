"""ONNX rewrites: one file a rewrite, applied in the literal order of `lowering.STRUCTURE_PASSES` and `lowering.PASSES`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class PassContext:
    """What a pass may know besides the graph: nothing of families or candidates, only parameters by name."""

    parameters: Mapping[str, tuple[int, ...]]
    """Shapes of all parameters, by state-dict name. Structure passes see them as graph inputs, later passes as initializers."""
    quantized: Mapping[str, str] = field(default_factory=dict)
    """Weight ▸ name of its precision, for everything the candidate quantizes."""
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Weight ▸ (low, high) of the input of its product."""
    half: bool = False
    """Whether the floats of the graph are to be float16."""


class Pass(Protocol):
    name: str
    standard: bool
    """The result is standard ONNX, so every backend gets the pass; otherwise only backends that name it."""
    exact: bool
    """The graph computes what it did, up to the order of float operations; otherwise it rounds. `pass_check` holds a pass to it."""
    requires: str
    """What must hold for the graph before, in one line."""
    ensures: str
    """What holds afterwards, in one line."""

    def apply(self, model: Any, context: PassContext) -> Any:
        """The rewritten onnx.ModelProto; may edit its argument. UnsupportedError naming the node that it cannot rewrite."""

"""A family: how one kind of pretrained model is cut into blocks, sliced, run elastically, and priced.

A family only describes. What follows from the description for any family (spaces, slices, sizes, extraction, lowering)
is in `network.py`, `supernet.py` and `lowering.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from nascompile.records import Operator, Precision, Workload

Linear = Callable[[str, Any, Any, Any], Any]
"""linear(weight parameter name, input, weight (out, in), bias or None) → output; the caller decides the arithmetic."""


@dataclass(frozen=True)
class Segment:
    """A block of the network with one main tensor in and one out, in execution order."""

    name: str
    """`embedding`, `layers.0.attention`, …, `head`."""
    kind: str
    """Kind of the operator it becomes: `embedding`, `attention`, `mlp`, `head`, …"""
    module: str
    """Path of the Hugging Face module."""
    layer: int | None
    """Layer it belongs to, dropped with it; None if always there."""
    start: tuple[str, Literal["input", "output"]] | None
    """Where the segment's main input tensor is: the data input, or the output, of the exported node that consumes this parameter.
    None for the first segment."""
    parameters: tuple[str, ...]
    """All parameters of the block, by state-dict name."""
    quantizable: tuple[str, ...] = ()
    """Weights that the precision gene covers."""
    scheme: str = ""
    """Name of the quantized precision the block may take (`int8`, `weight-int8`); empty: always FP32."""


@dataclass(frozen=True)
class Group:
    """Units (heads, neurons, channels, ranks) that are ordered by importance and kept as a prefix by one gene."""

    gene: str
    unit: int
    """Elements per unit along each member's axis."""
    count: int
    """Units of the largest network."""
    members: tuple[tuple[str, int], ...]
    """(parameter, axis) that carry the unit."""
    layer: int | None = None


@dataclass(frozen=True)
class InputSpec:
    """One named input: NumPy dtype, shape with symbolic dimensions as names, and the exclusive upper bound of integer inputs."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    high: int = 0


class Family(Protocol):
    """`config` is the Hugging Face configuration of the *largest* network (or the toy family's own)."""

    name: str
    model_types: tuple[str, ...]
    reads_first_token: bool
    """Whether the classifier reads the first token only: then what follows the last attention has one token."""

    def unsupported(self, config: Any) -> str:
        """Why this configuration cannot be handled; empty if it can."""

    def workload(self, config: Any, batch: int, sequence: int) -> Workload:
        """The workload of one call, with the model's own sequence or resolution filled in."""

    def inputs(self, config: Any) -> tuple[InputSpec, ...]:
        """Inputs in the order of export; symbolic dimensions `batch`, `sequence`."""

    def parameters(self, config: Any) -> dict[str, tuple[int, ...]]:
        """State-dict names and shapes of the largest network, without allocating it."""

    def segments(self, config: Any) -> tuple[Segment, ...]:
        """Blocks in execution order."""

    def groups(self, config: Any) -> tuple[Group, ...]:
        """Everything that a gene slices."""

    def choices(self, config: Any, width_multiple: int) -> dict[str, tuple[int, ...]]:
        """Values of every architecture gene, ascending; `depth` among them where layers can be dropped."""

    def operator(
        self, config: Any, segment: Segment, values: Mapping[str, int], workload: Workload, precision: Precision, first: bool = False
    ) -> Operator:  # fmt: skip
        """What the segment executes; `values`: gene ▸ value for every architecture gene.

        `first`: it belongs to the last layer or follows it, and only the first token of its output is computed.
        """

    def macs(self, operator: Operator) -> int:
        """Multiply-accumulates of one execution."""

    def activations(self, operator: Operator) -> int:
        """Elements of all tensors but weights that are alive at once, at most, while it executes; its input and output among them."""

    def create(self, config: Any) -> Any:
        """A new torch model of the largest network, random weights, in evaluation mode."""

    def load(self, folder: str, **config: Any) -> Any:
        """The torch model stored in a local folder (safetensors only), float32; `config` overrides configuration entries."""

    def forward(self, model: Any, inputs: Mapping[str, Any], layers: tuple[int, ...], values: Mapping[str, int], linear: Linear) -> Any:
        """Logits (batch, labels) of the sub-network; every weight is sliced inside, every quantizable product goes through `linear`."""

    def shrink(self, model: Any, layers: tuple[int, ...], values: Mapping[str, int]) -> None:
        """Drop layers and set head counts in place, once the parameters have been sliced; afterwards the model's own forward works."""

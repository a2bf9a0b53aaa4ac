"""Transformer encoders as ViT and BERT have them: attention and MLP blocks, heads and neurons sliced per layer.

A family names its parameters in a `Layout`; everything else here follows from it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from nascompile.families import Group, Linear, Segment
from nascompile.records import Operator, Precision, Workload

DEPTH_FRACTION = 0.5
HEAD_FRACTIONS = (0.5, 2 / 3, 5 / 6, 1.0)
WIDTH_FRACTIONS = (1 / 3, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Layout:
    """Where an encoder keeps its parts; `{i}` is the layer, module paths are relative to it."""

    layer: str
    query: str
    key: str
    value: str
    out: str
    fc1: str
    fc2: str
    attention_norm: str
    mlp_norm: str
    pre_norm: bool
    embedding: str
    head: tuple[str, ...]
    final_norm: str = ""
    tables: tuple[str, ...] = ()
    """Embedding tables worth quantizing."""

    def at(self, layer: int, part: str) -> str:
        return f"{self.layer.format(i=layer)}.{getattr(self, part)}"


@dataclass(frozen=True)
class Dims:
    """Sizes of an encoder."""

    hidden: int
    layers: int
    heads: int
    width: int
    activation: str

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


class EncoderFamily(ABC):
    """The part of the Family protocol that encoders share."""

    name = ""
    reads_first_token = True
    scheme_of_tables = "weight-int8"
    masked = False

    @abstractmethod
    def layout(self, config: Any) -> Layout:
        """Where the model keeps its parts."""

    @abstractmethod
    def dims(self, config: Any) -> Dims:
        """Its sizes."""

    @abstractmethod
    def create(self, config: Any) -> nn.Module:
        """A new model of the largest network, random weights, in evaluation mode."""

    @abstractmethod
    def embedding_operator(self, config: Any, workload: Workload, precision: Precision) -> Operator:
        """What the embedding block executes."""

    @abstractmethod
    def embed(self, model: Any, inputs: Mapping[str, torch.Tensor], linear: Linear) -> torch.Tensor:
        """(batch, sequence, hidden) before the first layer."""

    @abstractmethod
    def classify(self, model: Any, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (batch, labels) after the last layer."""

    # ------------------------------------------------------------------------------------------ description

    def parameters(self, config: Any) -> dict[str, tuple[int, ...]]:
        """State-dict names and shapes, from a model on the meta device."""
        return parameter_shapes(self, config)

    def segments(self, config: Any) -> tuple[Segment, ...]:
        """embedding, then attention and mlp of each layer, then head."""
        layout, dims, names = self.layout(config), self.dims(config), tuple(self.parameters(config))
        tables = tuple(t for t in layout.tables if t in names)
        found = [
            Segment(
                name="embedding", kind="embedding", module=layout.embedding, layer=None, start=None,
                parameters=_under(names, (layout.embedding,)), quantizable=tables, scheme=self.scheme_of_tables if tables else "",
            )
        ]  # fmt: skip
        for i in range(dims.layers):
            for kind in ("attention", "mlp"):
                parts = _ATTENTION if kind == "attention" else _MLP
                norm = "attention_norm" if kind == "attention" else "mlp_norm"
                modules = tuple(layout.at(i, part) for part in (*parts, norm))
                first = norm if layout.pre_norm else parts[0]
                found.append(
                    Segment(
                        name=f"layers.{i}.{kind}", kind=kind, module=_parent(modules[:-1]), layer=i,
                        start=(f"{layout.at(i, first)}.weight", "input"), parameters=_under(names, modules),
                        quantizable=tuple(f"{m}.weight" for m in modules[:-1]), scheme="int8",
                    )
                )  # fmt: skip
        start: tuple[str, Literal["input", "output"]] = (f"{layout.final_norm}.weight", "input")
        if not layout.final_norm:
            start = (f"{layout.at(dims.layers - 1, 'mlp_norm')}.weight", "output")
        head = tuple(m for m in (layout.final_norm, *layout.head) if m)
        found.append(
            Segment(name="head", kind="head", module=layout.head[-1], layer=None, start=start, parameters=_under(names, head))
        )
        return tuple(found)

    def groups(self, config: Any) -> tuple[Group, ...]:
        """Heads and neurons of every layer."""
        layout, dims, names = self.layout(config), self.dims(config), self.parameters(config)
        found = []
        for i in range(dims.layers):
            heads = [(f"{layout.at(i, part)}.{kind}", 0) for part in _ATTENTION[:3] for kind in ("weight", "bias")]
            neurons = [(f"{layout.at(i, 'fc1')}.{kind}", 0) for kind in ("weight", "bias")]
            heads.append((f"{layout.at(i, 'out')}.weight", 1))
            neurons.append((f"{layout.at(i, 'fc2')}.weight", 1))
            found.append(Group(f"layers.{i}.heads", dims.head_dim, dims.heads, tuple(m for m in heads if m[0] in names), i))
            found.append(Group(f"layers.{i}.width", 1, dims.width, tuple(m for m in neurons if m[0] in names), i))
        return tuple(found)

    def choices(self, config: Any, width_multiple: int) -> dict[str, tuple[int, ...]]:
        """Depth from half the layers up; heads and MLP widths from the fractions above."""
        dims = self.dims(config)
        heads = tuple(sorted({max(1, round(dims.heads * f)) for f in HEAD_FRACTIONS}))
        widths = {max(width_multiple, int(dims.width * f) // width_multiple * width_multiple) for f in WIDTH_FRACTIONS[:-1]}
        widths = {w for w in widths if w < dims.width} | {dims.width}
        found = {"depth": tuple(range(max(1, round(dims.layers * DEPTH_FRACTION)), dims.layers + 1))}
        for i in range(dims.layers):
            found[f"layers.{i}.heads"] = heads
            found[f"layers.{i}.width"] = tuple(sorted(widths))
        return found

    def operator(
        self, config: Any, segment: Segment, values: Mapping[str, int], workload: Workload, precision: Precision, first: bool = False
    ) -> Operator:  # fmt: skip
        """Kinds embedding, attention, mlp, head with their dimensions; what has the first token only has a sequence of one."""
        if segment.kind == "embedding":
            return self.embedding_operator(config, workload, precision)
        dims = self.dims(config)
        sequence = 1 if first and segment.kind != "attention" else workload.sequence
        common = (("batch", workload.batch), ("sequence", sequence), ("hidden", dims.hidden))
        norm = "pre" if self.layout(config).pre_norm else "post"
        if segment.kind == "attention":
            heads = values[f"layers.{segment.layer}.heads"]
            return Operator(
                kind="attention", dims=(*common, ("heads", heads), ("head_dim", dims.head_dim)),
                attributes=(("mask", int(self.masked)), ("norm", norm), *((("out", "first token"),) if first else ())), precision=precision,
            )  # fmt: skip
        if segment.kind == "mlp":
            width = values[f"layers.{segment.layer}.width"]
            return Operator(
                kind="mlp", dims=(*common, ("width", width)), attributes=(("activation", dims.activation), ("norm", norm)),
                precision=precision,
            )  # fmt: skip
        modules = len(self.layout(config).head)
        return Operator(
            kind="head", dims=(*common, ("labels", config.num_labels)), attributes=(("modules", modules),), precision=precision
        )

    def macs(self, operator: Operator) -> int:
        """Products of linears and attention; look-ups, norms and activations count nothing."""
        d = dict(operator.dims)
        tokens = d["batch"] * d["sequence"]
        if operator.kind == "attention":
            inner = d["heads"] * d["head_dim"]
            written = d["batch"] if "out" in dict(operator.attributes) else tokens
            return tokens * (3 * d["hidden"] + 2 * d["sequence"]) * inner + written * d["hidden"] * inner
        if operator.kind == "mlp":
            return tokens * 2 * d["hidden"] * d["width"]
        if operator.kind == "head":
            modules = int(dict(operator.attributes)["modules"])
            return d["batch"] * (d["hidden"] * d["labels"] + (modules - 1) * d["hidden"] ** 2)
        return d["batch"] * (d["sequence"] - 1) * d["hidden"] * d["channels"] * d["patch"] ** 2 if "patch" in d else 0

    def activations(self, operator: Operator) -> int:
        """What is added to the block's output is alive throughout; softmax and activation functions work in place."""
        d = dict(operator.dims)
        tokens = d["batch"] * d["sequence"]
        hidden = tokens * d["hidden"]
        if operator.kind == "attention":
            inner = d["heads"] * d["head_dim"]
            written = d["batch"] if "out" in dict(operator.attributes) else tokens
            return hidden + (written + 2 * tokens) * inner + max(hidden, written * d["heads"] * d["sequence"])
        if operator.kind == "mlp":
            return 2 * hidden + tokens * d["width"]
        if operator.kind == "head":
            return hidden + d["batch"] * (d["hidden"] + max(d["hidden"], d["labels"]))
        return hidden + (d["batch"] * (d["sequence"] - 1) * d["channels"] * d["patch"] ** 2 if "patch" in d else hidden)

    # ------------------------------------------------------------------------------------------ execution

    def forward(
        self, model: Any, inputs: Mapping[str, torch.Tensor], layers: tuple[int, ...], values: Mapping[str, int], linear: Linear
    ) -> torch.Tensor:
        """Logits (batch, labels) of the sub-network."""
        layout, dims = self.layout(model.config), self.dims(model.config)
        hidden = self.embed(model, inputs, linear)
        mask = inputs["attention_mask"][:, None, None, :].bool() if self.masked else None
        for i in layers:
            block = _Block(model, layout, dims, i, linear)
            heads, width = values[f"layers.{i}.heads"], values[f"layers.{i}.width"]
            if layout.pre_norm:
                hidden = hidden + block.attention(block.norm("attention_norm", hidden), mask, heads)
                hidden = hidden + block.mlp(block.norm("mlp_norm", hidden), width)
            else:
                hidden = block.norm("attention_norm", hidden + block.attention(hidden, mask, heads))
                hidden = block.norm("mlp_norm", hidden + block.mlp(hidden, width))
        if layout.final_norm:
            hidden = model.get_submodule(layout.final_norm)(hidden)
        return self.classify(model, hidden)

    def shrink(self, model: Any, layers: tuple[int, ...], values: Mapping[str, int]) -> None:
        """Drop layers and set head counts; the sliced linears are already in place."""
        layout, dims = self.layout(model.config), self.dims(model.config)
        for i in layers:
            heads = values[f"layers.{i}.heads"]
            attention = model.get_submodule(_parent((layout.at(i, "query"),)))
            for attribute, value in (("num_attention_heads", heads), ("n_heads", heads), ("all_head_size", heads * dims.head_dim)):
                if hasattr(attention, attribute):
                    setattr(attention, attribute, value)
        parent, _, name = layout.layer.format(i=0).rpartition(".")[0].rpartition(".")
        owner = model.get_submodule(parent)
        stack = getattr(owner, name)
        setattr(owner, name, nn.ModuleList(stack[i] for i in layers))
        model.config.num_hidden_layers = len(layers)
        if len(widths := {values[f"layers.{i}.width"] for i in layers}) == 1:
            # one width for all is something the stock configuration can say, and then from_pretrained opens the network
            setattr(model.config, "hidden_dim" if hasattr(model.config, "hidden_dim") else "intermediate_size", widths.pop())


_ATTENTION = ("query", "key", "value", "out")
_MLP = ("fc1", "fc2")


class _Block:
    """One layer of the largest network, run sliced; holds no choice between calls."""

    def __init__(self, model: Any, layout: Layout, dims: Dims, layer: int, linear: Linear) -> None:
        from transformers.activations import ACT2FN

        self.model, self.layout, self.dims, self.layer, self.linear = model, layout, dims, layer, linear
        self.activation = ACT2FN[dims.activation]
        self.dropout = getattr(model.config, "hidden_dropout_prob", getattr(model.config, "dropout", 0.0)) if model.training else 0.0
        attention = getattr(model.config, "attention_probs_dropout_prob", getattr(model.config, "attention_dropout", 0.0))
        self.attention_dropout = attention if model.training else 0.0

    def norm(self, part: str, x: torch.Tensor) -> torch.Tensor:
        norm: torch.Tensor = self.model.get_submodule(self.layout.at(self.layer, part))(x)
        return norm

    def product(self, part: str, x: torch.Tensor, rows: int | None = None, columns: int | None = None) -> torch.Tensor:
        """x (batch, sequence, in) through the first `rows` outputs and `columns` inputs of a linear."""
        path = self.layout.at(self.layer, part)
        module = self.model.get_submodule(path)
        bias = None if module.bias is None else module.bias[:rows]
        result: torch.Tensor = self.linear(f"{path}.weight", x, module.weight[:rows, :columns], bias)
        return result

    def attention(self, x: torch.Tensor, mask: torch.Tensor | None, heads: int) -> torch.Tensor:
        batch, sequence, _ = x.shape
        inner = heads * self.dims.head_dim
        shape = (batch, sequence, heads, self.dims.head_dim)
        q, k, v = (self.product(part, x, rows=inner).view(shape).transpose(1, 2) for part in _ATTENTION[:3])
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=self.attention_dropout)
        out = self.product("out", context.transpose(1, 2).reshape(batch, sequence, inner), columns=inner)
        return F.dropout(out, self.dropout, training=self.dropout > 0)

    def mlp(self, x: torch.Tensor, width: int) -> torch.Tensor:
        out = self.product("fc2", self.activation(self.product("fc1", x, rows=width)), columns=width)
        return F.dropout(out, self.dropout, training=self.dropout > 0)


def load_pretrained(cls: Any, folder: str, **config: Any) -> nn.Module:
    """A Hugging Face model from a local folder, float32, eager attention (the form that exports cleanly), safetensors only."""
    with quiet():
        return cls.from_pretrained(  # type: ignore[no-any-return]
            folder, use_safetensors=True, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False,
            ignore_mismatched_sizes=True, **config,
        ).eval()  # fmt: skip


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own progress bars and loading reports: what matters of them is said by the stages."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def parameter_shapes(family: Any, config: Any) -> dict[str, tuple[int, ...]]:
    """Parameter names and shapes of `family.create(config)`, from a model on the meta device; remembered per configuration."""
    key = (family.name, config.to_json_string(use_diff=False))
    if key not in _SHAPES:
        with torch.device("meta"):
            model = family.create(config)
        _SHAPES[key] = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return dict(_SHAPES[key])


_SHAPES: dict[tuple[str, str], dict[str, tuple[int, ...]]] = {}


def _under(names: tuple[str, ...], modules: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(n for n in names if any(n == m or n.startswith(f"{m}.") for m in modules))


def _parent(modules: tuple[str, ...]) -> str:
    """Longest module path that holds all of these."""
    parts = [m.split(".") for m in modules]
    shared = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared if len(modules) > 1 else parts[0][:-1])

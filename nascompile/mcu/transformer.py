"""The program of a vision transformer, in three plans: operators one by one, or fused so that little is ever whole.

Where numbers come from is not known here: `Numbers` gives every part its constants, made up or calibrated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from nascompile.errors import BudgetError, UnsupportedError
from nascompile.mcu import constants, program as p, project
from nascompile.mcu.board import Board
from nascompile.records import OperatorGraph, Record

Fusion = Literal["none", "blocks", "all"]
"""none: an operator at a time, scores of all heads, the whole image. blocks: image by bands, attention a head at a time, MLP by tiles.
all: besides, no normalized tensor is ever whole, which costs one more normalization a head."""


FUSIONS: tuple[Fusion, ...] = ("blocks", "all")
"""Faster first."""


class Layer(Record, frozen=True):
    """Sizes of a layer: heads that were kept, channels of each, and of the MLP; the rank of its maps (0: whole)."""

    heads: int
    head_width: int
    hidden: int
    rank: int = 0

    @property
    def inner(self) -> int:
        return self.heads * self.head_width

    def factors(self, inputs: int, outputs: int) -> int:
        """The rank in which a map of the layer is two factors; 0 where they would be no smaller than the whole."""
        return self.rank if self.rank * (inputs + outputs) < inputs * outputs else 0


class Shape(Record, frozen=True):
    """Sizes of a vision transformer."""

    image: tuple[int, int, int]
    patch: int
    width: int
    layers: tuple[Layer, ...]
    classes: int

    def __post_init__(self) -> None:
        height, width, _ = self.image
        if self.patch < 1 or height % self.patch or width % self.patch:
            raise UnsupportedError(
                f"an image of {height} x {width} is no whole number of patches of {self.patch} x {self.patch}",
                hint="an image size that the patch size divides",
            )

    @property
    def patches(self) -> int:
        return (self.image[0] // self.patch) * (self.image[1] // self.patch)

    @property
    def tokens(self) -> int:
        return self.patches + 1

    @classmethod
    def uniform(cls, image: tuple[int, int, int], patch: int, width: int, depth: int, heads: int, hidden: int, classes: int) -> Shape:
        """The same sizes in every layer."""
        layers = (Layer(heads=heads, head_width=width // heads, hidden=hidden),) * depth
        return cls(image=image, patch=patch, width=width, layers=layers, classes=classes)

    @classmethod
    def of_graph(cls, graph: OperatorGraph, resolution: tuple[int, int]) -> Shape:
        """From the operators of a `vit` or `mcu_vit` candidate, whose own image goes before the resolution; UnsupportedError for others."""
        by_kind: dict[str, list[dict[str, int]]] = {}
        for node in graph.nodes:
            by_kind.setdefault(node.operator.kind, []).append(dict(node.operator.dims))
        if set(by_kind) != {"embedding", "attention", "mlp", "head"} or "patch" not in by_kind["embedding"][0]:
            kinds = ", ".join(sorted(by_kind))
            raise UnsupportedError(f"no microcontroller program for operators {kinds}", hint="vision transformers have one")
        [embedding], [head] = by_kind["embedding"], by_kind["head"]
        layers = tuple(
            Layer(heads=a["heads"], head_width=a["head_dim"], hidden=m["width"], rank=max(a.get("rank", 0), m.get("rank", 0)))
            for a, m in zip(by_kind["attention"], by_kind["mlp"], strict=True)
        )
        side = embedding.get("image", 0)
        image = (*((side, side) if side else resolution), embedding["channels"])
        return cls(image=image, patch=embedding["patch"], width=embedding["hidden"], layers=layers, classes=head["labels"])


class Numbers(Protocol):
    """Constants of parts; each call adds what it names to `constants`."""

    constants: dict[str, np.ndarray[Any, Any]]

    def map(self, name: str, inputs: int, outputs: int, *, gelu: bool = False, residual: bool = False, rank: int = 0) -> p.Map:
        """Of two factors where there is a rank."""

    def norm(self, name: str, width: int) -> p.Norm: ...

    def head(self, name: str, inputs: int, width: int, rank: int = 0) -> p.Head:
        """Keys and values of one head; their first factors are those of all heads of the layer."""

    def products(self, name: str, heads: int, *, scores: bool) -> tuple[p.Product, ...]: ...

    def table(self, name: str, kind: Literal["gelu", "softmax"]) -> str: ...

    def add(self, name: str, count: int) -> p.Add: ...

    def rows(self, name: str, rows: int, width: int) -> str: ...

    def scale(self, name: str) -> tuple[float, int]:
        """Scale and zero point of a tensor, for people."""


@dataclass
class _Building:
    numbers: Numbers
    tensors: list[p.Tensor] = field(default_factory=list)
    operations: list[p.Operation] = field(default_factory=list)

    def add(self, name: str, kernel: p.Kernel, inputs: tuple[str, ...], output: str, shape: tuple[int, ...], size: int = 0) -> str:
        """Append an operator; its output's name."""
        self.tensor(output, shape, size)
        self.operations.append(p.Operation(name=name, kernel=kernel, inputs=inputs, outputs=(output,)))
        return output

    def tensor(self, name: str, shape: tuple[int, ...], size: int = 0) -> str:
        scale, zero_point = self.numbers.scale(name)
        self.tensors.append(p.Tensor(name=name, shape=shape, size_bytes=size or int(np.prod(shape)), scale=scale, zero_point=zero_point))
        return name


def build(name: str, shape: Shape, numbers: Numbers, fusion: Fusion = "blocks") -> p.Program:
    """The program, class scores (int32) last. What follows the last layer's attention is computed for the class token only."""
    b = _Building(numbers)
    image = b.add("image", p.Read(rows=shape.image[0]), (), "image", shape.image) if fusion == "none" else ""
    x = b.add("embedding", _embed(shape, numbers, streamed=not image), (image,) if image else (), "tokens", (shape.tokens, shape.width))
    for i, layer in enumerate(shape.layers):
        rows = 1 if i == len(shape.layers) - 1 else shape.tokens
        x = (_plain_layer if fusion == "none" else _fused_layer)(b, f"layers.{i}", shape, layer, rows, x, fusion == "all")
    normalized = b.add("norm", p.Normalize(norm=numbers.norm("norm", shape.width), rows=1), (x,), "features", (1, shape.width))
    head = numbers.map("head", shape.width, shape.classes)
    assert isinstance(head, p.Linear)
    scores = b.add("head", p.Classify(linear=head), (normalized,), "scores", (shape.classes,), 4 * shape.classes)
    structure = p.Structure(
        name=name, tensors=tuple(b.tensors), operations=tuple(b.operations), image=shape.image, output=scores
    )
    return p.Program(structure, numbers.constants)


def _embed(shape: Shape, numbers: Numbers, streamed: bool) -> p.Embed:
    height, width, channels = shape.image
    linear = numbers.map("embedding", shape.patch**2 * channels, shape.width, residual=True)
    assert isinstance(linear, p.Linear)
    return p.Embed(
        linear=linear, patch=shape.patch, channels=channels, columns=width // shape.patch, bands=height // shape.patch,
        position=numbers.rows("position", shape.patches, shape.width), first=numbers.rows("class_token", 1, shape.width), streamed=streamed,
    )  # fmt: skip


def _fused_layer(b: _Building, at: str, shape: Shape, layer: Layer, rows: int, x: str, repeat_norm: bool) -> str:
    """Attention a head at a time over queries, MLP by tiles over the tokens."""
    n, d, inner = shape.tokens, shape.width, layer.inner
    rank, mlp_rank = layer.factors(d, inner), layer.factors(d, layer.hidden)
    norm: p.Norm | None = b.numbers.norm(f"{at}.norm1", d)
    assert norm is not None
    source = x
    if not repeat_norm:
        source = b.add(f"{at}.norm1", p.Normalize(norm=norm, rows=n), (x,), f"{at}.normalized", (n, d))
        norm = None
    queries = p.Dense(map=b.numbers.map(f"{at}.queries", d, inner, rank=rank), rows=rows, norm=norm)
    q = b.add(f"{at}.queries", queries, (source,), f"{at}.q", (rows, inner))
    heads = tuple(b.numbers.head(f"{at}.head{h}", d, layer.head_width, rank) for h in range(layer.heads))
    attend = p.Attend(heads=heads, width=layer.head_width, tokens=n, rows=rows, norm=norm)
    mixed = b.add(f"{at}.attention", attend, (source, q), f"{at}.mixed", (rows, inner))
    project = p.Dense(map=b.numbers.map(f"{at}.projection", inner, d, residual=True, rank=rank), rows=rows)
    # where only the class token goes on, the residual is the first row of x
    x = b.add(f"{at}.projection", project, (mixed, x), f"{at}.attended", (rows, d))
    up = b.numbers.map(f"{at}.up", d, layer.hidden, gelu=True, rank=mlp_rank)
    down = b.numbers.map(f"{at}.down", layer.hidden, d, residual=True, rank=mlp_rank)
    mlp = p.Mlp(norm=b.numbers.norm(f"{at}.norm2", d), up=up, down=down, rows=rows)
    return b.add(f"{at}.mlp", mlp, (x,), f"{at}.out", (rows, d))


def _plain_layer(b: _Building, at: str, shape: Shape, layer: Layer, rows: int, x: str, _: bool) -> str:
    """Every operator by itself."""
    n, d, heads, numbers = shape.tokens, shape.width, layer.heads, b.numbers
    width, inner, hidden = layer.head_width, layer.inner, layer.hidden
    rank, mlp_rank = layer.factors(d, inner), layer.factors(d, hidden)
    source = b.add(f"{at}.norm1", p.Normalize(norm=numbers.norm(f"{at}.norm1", d), rows=n), (x,), f"{at}.normalized", (n, d))
    queries = p.Dense(map=numbers.map(f"{at}.queries", d, inner, rank=rank), rows=rows)
    q = b.add(f"{at}.queries", queries, (source,), f"{at}.q", (rows, inner))
    parts = [numbers.head(f"{at}.head{h}", d, width, rank) for h in range(heads)]
    keys = p.Split(maps=tuple(h.keys for h in parts), rows=n, layout="keys")
    k = b.add(f"{at}.keys", keys, (source,), f"{at}.k", (heads, n, width), heads * keys.head_bytes)
    values = p.Split(maps=tuple(h.values for h in parts), rows=n, layout="values")
    v = b.add(f"{at}.values", values, (source,), f"{at}.v", (heads, n, width), heads * values.head_bytes)
    scores = p.Scores(products=numbers.products(f"{at}.scores", heads, scores=True), rows=rows, tokens=n, width=width)
    s = b.add(f"{at}.scores", scores, (q, k), f"{at}.s", (heads, rows, n))
    softmax = p.Softmax(table=numbers.table(f"{at}.softmax", "softmax"), rows=heads * rows, width=n)
    e = b.add(f"{at}.softmax", softmax, (s,), f"{at}.e", (heads, rows, n))
    mix = p.Mix(products=numbers.products(f"{at}.mix", heads, scores=False), rows=rows, tokens=n, width=width)
    mixed = b.add(f"{at}.mix", mix, (e, v), f"{at}.mixed", (rows, inner))
    project = p.Dense(map=numbers.map(f"{at}.projection", inner, d, rank=rank), rows=rows)
    projected = b.add(f"{at}.projection", project, (mixed,), f"{at}.o", (rows, d))
    x = b.add(f"{at}.add1", numbers.add(f"{at}.add1", rows * d), (projected, x), f"{at}.attended", (rows, d))
    source = b.add(f"{at}.norm2", p.Normalize(norm=numbers.norm(f"{at}.norm2", d), rows=rows), (x,), f"{at}.normalized2", (rows, d))
    up = b.add(f"{at}.up", p.Dense(map=numbers.map(f"{at}.up", d, hidden, rank=mlp_rank), rows=rows), (source,), f"{at}.h", (rows, hidden))
    lookup = p.Lookup(table=numbers.table(f"{at}.gelu", "gelu"), count=rows * hidden)
    g = b.add(f"{at}.gelu", lookup, (up,), f"{at}.g", (rows, hidden))
    down = b.add(f"{at}.down", p.Dense(map=numbers.map(f"{at}.down", hidden, d, rank=mlp_rank), rows=rows), (g,), f"{at}.m", (rows, d))
    return b.add(f"{at}.add2", numbers.add(f"{at}.add2", rows * d), (down, x), f"{at}.out", (rows, d))


class SizesOnly:
    """Parts without numbers: enough for a memory plan and a footprint."""

    def __init__(self) -> None:
        self.constants: dict[str, np.ndarray[Any, Any]] = {}

    def map(self, name: str, inputs: int, outputs: int, *, gelu: bool = False, residual: bool = False, rank: int = 0) -> p.Map:
        return self._map(name, inputs, outputs, gelu, residual, rank, f"{name}.first")

    def _map(self, name: str, inputs: int, outputs: int, gelu: bool, residual: bool, rank: int, first: str) -> p.Map:
        if rank:
            second = self._linear(f"{name}.second", rank, outputs, gelu, residual)
            return p.LowRank(name=name, first=self._linear(first, inputs, rank), second=second)
        return self._linear(name, inputs, outputs, gelu, residual)

    def _linear(self, name: str, inputs: int, outputs: int, gelu: bool = False, residual: bool = False) -> p.Linear:
        return p.Linear(
            name=name, weights="", bias="", multiplier="", inputs=inputs, outputs=outputs, table=f"{name}.gelu" if gelu else "",
            residual_multiplier=int(residual),
        )  # fmt: skip

    def norm(self, name: str, width: int) -> p.Norm:
        return p.Norm(name=name, affine=f"{name}.affine", epsilon=0, width=width)

    def head(self, name: str, inputs: int, width: int, rank: int = 0) -> p.Head:
        keys, values = (
            self._map(f"{name}.{part}", inputs, width, False, False, rank, first_of(name, part)) for part in ("keys", "values")
        )
        return p.Head(name=name, keys=keys, values=values, score_multiplier=0, ratio=0, value_zero=0, zero_point=0)

    def products(self, name: str, heads: int, *, scores: bool) -> tuple[p.Product, ...]:
        return tuple(p.Product(name=f"{name}.{h}", multiplier=0, w_zero=0, zero_point=0) for h in range(heads))

    def table(self, name: str, kind: Literal["gelu", "softmax"]) -> str:
        return name

    def add(self, name: str, count: int) -> p.Add:
        return p.Add(a_multiplier=0, b_multiplier=0, constant=0, count=count)

    def rows(self, name: str, rows: int, width: int) -> str:
        return name

    def scale(self, name: str) -> tuple[float, int]:
        return 1.0, 0


class RandomNumbers:
    """Weights and constants drawn from a seed, scaled so that activations fill int8 without saturating: to count with, not to classify."""

    def __init__(self, seed: int) -> None:
        self.constants: dict[str, np.ndarray[Any, Any]] = {}
        self._rng = np.random.default_rng(seed)
        self._first: dict[str, p.Linear] = {}

    def map(self, name: str, inputs: int, outputs: int, *, gelu: bool = False, residual: bool = False, rank: int = 0) -> p.Map:
        table = self.table(f"{name}.gelu", "gelu") if gelu else ""
        return self._map(name, inputs, outputs, table, residual, rank, f"{name}.first")

    def _map(self, name: str, inputs: int, outputs: int, table: str, residual: bool, rank: int, first: str) -> p.Map:
        if not rank:
            return self._linear(name, inputs, outputs, table, residual)
        if first not in self._first:
            self._first[first] = self._linear(first, inputs, rank, "", False, spread=1200)
        second = self._linear(f"{name}.second", rank, outputs, table, residual, input_spread=1200)
        return p.LowRank(name=name, first=self._first[first], second=second)

    def _linear(
        self, name: str, inputs: int, outputs: int, table: str, residual: bool, spread: float = 30.0, input_spread: float = 40.0
    ) -> p.Linear:
        self.constants[f"{name}.weights"] = self._rng.integers(-127, 128, (outputs, inputs)).astype(np.int8)
        # the sum of products of uniform weights (deviation 73) and inputs of the given deviation, down to `spread`
        ratio = spread / (73.0 * input_spread * inputs**0.5)
        self.constants[f"{name}.multiplier"] = np.round(ratio * self._rng.uniform(0.8, 1.2, outputs) * 2**32).astype(np.int32)
        self.constants[f"{name}.bias"] = np.round(self._rng.normal(0, 8, outputs) / ratio).astype(np.int32)
        first = name.endswith(".first")
        return p.Linear(
            name=name, weights=f"{name}.weights", bias=f"{name}.bias", multiplier=f"{name}.multiplier", inputs=inputs, outputs=outputs,
            x_zero=0 if name.endswith(".second") else int(self._rng.integers(-5, 6)),
            zero_point=0 if first or name.endswith("queries") or ".queries." in name else int(self._rng.integers(-5, 6)), table=table,
            residual_multiplier=round(0.8 * 2**24) if residual else 0, residual_zero=int(self._rng.integers(-5, 6)) if residual else 0,
        )  # fmt: skip

    def norm(self, name: str, width: int) -> p.Norm:
        gain = np.round(self._rng.uniform(20, 40, width) * 2**17)
        shift = np.round(self._rng.normal(0, 5, width) * 256 + 128)
        self.constants[f"{name}.affine"] = np.stack([gain, shift], 1).ravel().astype(np.int32)
        return p.Norm(name=name, affine=f"{name}.affine", epsilon=width * width // 100, width=width)

    def head(self, name: str, inputs: int, width: int, rank: int = 0) -> p.Head:
        keys, values = (self._map(f"{name}.{part}", inputs, width, "", False, rank, first_of(name, part)) for part in ("keys", "values"))
        # scores of deviation 2 from products of two inputs of deviation 30
        return p.Head(
            name=name, keys=keys, values=values, score_multiplier=round(2 * 64 * 2**32 / (900 * width**0.5)), ratio=round(2.0 * 2**28),
            value_zero=int(self._rng.integers(-5, 6)), zero_point=int(self._rng.integers(-5, 6)),
        )  # fmt: skip

    def products(self, name: str, heads: int, *, scores: bool) -> tuple[p.Product, ...]:
        multiplier = round(2**32 * (20 / 900 / 5.7 if scores else 2 / 256))
        return tuple(
            p.Product(
                name=f"{name}.{h}", multiplier=multiplier, w_zero=int(self._rng.integers(-5, 6)), zero_point=int(self._rng.integers(-5, 6))
            )
            for h in range(heads)
        )

    def table(self, name: str, kind: Literal["gelu", "softmax"]) -> str:
        self.constants[name] = constants.softmax_table(0.1) if kind == "softmax" else constants.lookup(constants.gelu, 1 / 16, 0, 1 / 16, 0)
        return name

    def add(self, name: str, count: int) -> p.Add:
        a, b = round(0.7 * 2**20), round(0.8 * 2**20)
        return p.Add(a_multiplier=a, b_multiplier=b, constant=2**19, count=count)

    def rows(self, name: str, rows: int, width: int) -> str:
        self.constants[name] = np.clip(np.round(self._rng.normal(0, 20, (rows, width))), -128, 127).astype(np.int8)
        return name

    def scale(self, name: str) -> tuple[float, int]:
        return 1.0, 0


def first_of(head: str, part: str) -> str:
    """The first factor of all keys, or values, of a layer: `layers.0.key.first` of `layers.0.head2` and `keys`."""
    return f"{head.rpartition('.')[0]}.{part.removesuffix('s')}.first"


def fitting(make: Callable[[Fusion], p.Program], board: Board) -> tuple[p.Program, project.Planned]:
    """The fastest of the fused programs that fits a board, else the smallest, placed without regard to the limits."""
    for fusion in FUSIONS:
        program = make(fusion)
        try:
            return program, project.place(program.structure, board)
        except BudgetError:
            continue
    return program, project.place(program.structure, board, smallest=True, enforce=False)

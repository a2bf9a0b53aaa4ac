"""The C text of a planned program: `weights.c`, `weights.h`, and `model.c`, which is parameters and straight-line calls.

Arithmetic is in the kernels. Sizes are known beforehand: of constants exactly, of calls by an upper bound that the linker script checks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import singledispatchmethod
from typing import Any

import numpy as np
import numpy.typing as npt

from nascompile.mcu import constants, packing, program as p
from nascompile.mcu.board import COUNT_REMARK
from nascompile.mcu.planner import ALIGN, Plan

CALL_BYTES, LOOP_BYTES, FRAME_BYTES = 44, 64, 128
"""Flash set aside in model.c for a call, a loop over tiles, and the rest; more than they take."""
STRUCTS = {
    "nc_linear_t": 48, "nc_low_rank_t": 96, "nc_attention_t": 36, "nc_matmul_t": 32, "nc_layer_norm_t": 32, "nc_add_t": 12,
    "nc_mean_t": 24, "nc_patch_embed_t": 64, "nc_conv_t": 80, "nc_depthwise_t": 36, "nc_average_pool_t": 32, "nc_model_t": 36,
}  # fmt: skip
"""sizeof, on the target; a test compiles it."""
EXP_TABLE, _EXP_TABLE_BYTES = "nc.exp_table", 2048


@dataclass(frozen=True)
class Counted:
    """What one counter counts: all calls of one kernel in one operator."""

    operator: str
    part: str
    """What the kernel does there, such as `keys`."""
    function: str
    macs: int

    @property
    def label(self) -> str:
        return self.operator if self.part in ("", self.operator.rsplit(".", 1)[-1]) else f"{self.operator}.{self.part}"


@dataclass(frozen=True)
class Source:
    """C files of a model, and what is known of their size."""

    model_c: str
    weights_h: str
    weights_c: str
    counted: tuple[Counted, ...]
    functions: tuple[str, ...]
    """Kernels that are called, sorted."""
    model_bytes: int
    """Flash set aside for model.c."""
    weights_bytes: int


@dataclass
class Writer:
    """Collects what the operators write, in order."""

    program: p.Structure
    plan: Plan
    parameters: dict[str, str] = field(default_factory=dict)
    """Name ▸ its definition."""
    used: dict[str, None] = field(default_factory=dict)
    """Constants that are read, in order."""
    body: list[str] = field(default_factory=list)
    counted: list[Counted] = field(default_factory=list)
    model_bytes: int = FRAME_BYTES
    indent: str = "    "

    @property
    def functions(self) -> tuple[str, ...]:
        """Kernels that are called, sorted."""
        return tuple(sorted({c.function for c in self.counted if c.function.startswith("nc_")}))

    # ------------------------------------------------------------------------------------------ text

    def constant(self, name: str) -> str:
        if not name:
            return "0"
        self.used.setdefault(name)
        return identifier(name)

    def struct(self, kind: str, name: str, fields: Mapping[str, Any]) -> str:
        """A parameter; its address. Where it was named before, it must be the same."""
        own = identifier(name)
        text = f"static const {kind} {own} = {_braces(fields)};"
        if own not in self.parameters:
            self.parameters[own] = text
            self.model_bytes += _up(STRUCTS[kind])
        assert self.parameters[own] == text, f"two parameters are named {own}"
        return f"&{own}"

    def line(self, text: str) -> None:
        self.body.append(self.indent + text)

    def call(self, op: p.Operation, part: str, macs: int, function: str, *arguments: Any) -> None:
        """One kernel call, counted with the other calls of that part of the operator."""
        key = [i for i, c in enumerate(self.counted) if (c.operator, c.part) == (op.name, part)]
        if key:
            old = self.counted[key[0]]
            self.counted[key[0]] = Counted(op.name, part, function, old.macs + macs)
        else:
            self.counted.append(Counted(op.name, part, function, macs))
        number = key[0] if key else len(self.counted) - 1
        self.line(f"NC_MARK({number});")
        self.line(f"{function}({', '.join(map(str, arguments))});")
        self.model_bytes += CALL_BYTES

    def loop(self, rows: int, tile: int) -> None:
        """Over tiles of rows: `t` is the first of a tile, `n` how many it has."""
        self.line(f"for (uint32_t t = 0; t < {rows}; t += {tile}) {{")
        self.indent += "    "
        self.line(f"const uint32_t n = t + {tile} <= {rows} ? {tile} : {rows} - t;")
        self.model_bytes += LOOP_BYTES

    def end(self) -> None:
        self.indent = self.indent[:-4]
        self.line("}")

    # ------------------------------------------------------------------------------------------ parameters

    def linear_fields(self, linear: p.Linear, y_stride: int, layout: str = "NC_ROWS", x_stride: int = 0) -> dict[str, Any]:
        residual = {"residual_constant": f"INT64_C({linear.residual_constant})", "residual_multiplier": linear.residual_multiplier}
        return {
            "weights": self.constant(packed_name(linear)), "table": self.constant(linear.table),
            **(residual if linear.residual_multiplier else {}), "zero_point": linear.zero_point, "inputs": linear.inputs,
            "outputs": linear.outputs, "x_stride": x_stride or linear.inputs, "y_stride": y_stride, "layout": layout,
        }  # fmt: skip

    def map(self, map_: p.Map, y_stride: int, layout: str = "NC_ROWS") -> tuple[str, str]:
        """(function, address of its parameters)."""
        if isinstance(map_, p.Linear):
            return "nc_linear", self.struct("nc_linear_t", map_.name, self.linear_fields(map_, y_stride, layout))
        first = self.linear_fields(map_.first, 0)
        second = self.linear_fields(map_.second, y_stride, layout)
        return "nc_low_rank", self.struct("nc_low_rank_t", map_.name, {"first": first, "second": second})

    def norm(self, norm: p.Norm) -> str:
        fields = {
            "affine": self.constant(norm.affine), "epsilon": f"UINT64_C({norm.epsilon})", "width": norm.width, "x_stride": norm.width,
            "y_stride": norm.width,
        }  # fmt: skip
        return self.struct("nc_layer_norm_t", norm.name, fields)

    # ------------------------------------------------------------------------------------------ operators

    def operator(self, index: int) -> None:
        op = self.program.operations[index]
        tile = self.plan.tiles[index]
        names = {"x": op.inputs[0] if op.inputs else "", "y": op.outputs[0]}
        shape = " x ".join(map(str, self.program.tensor(op.outputs[0]).shape))
        tiled = f", {tile} at a time" if tile else ""
        self.body.append("")
        self.line(f"/* {op.name}: {type(op.kernel).__name__.lower()} to {shape}{tiled} */")
        self.line("{")
        self.indent += "    "
        for key, name in names.items():
            if name:
                self.line(f"int8_t *const {key} = AT({self.plan.offsets[name]});")
        if len(op.inputs) > 1:
            self.line(f"int8_t *const x2 = AT({self.plan.offsets[op.inputs[1]]});")
        self.write(op.kernel, op, index)
        self.indent = self.indent[:-4]
        self.line("}")

    def at(self, index: int, part: int = 0) -> str:
        return f"AT({self.plan.scratch[index][0] + part})"

    @singledispatchmethod
    def write(self, kernel: Any, op: p.Operation, index: int) -> None:
        raise TypeError(f"no C for {type(kernel).__name__}")

    @write.register
    def _(self, k: p.Embed, op: p.Operation, index: int) -> None:
        width = k.linear.outputs
        fields = {
            "linear": self.linear_fields(k.linear, width), "patch": k.patch, "channels": k.channels, "columns": k.columns,
        }  # fmt: skip
        own = self.struct("nc_patch_embed_t", k.linear.name, fields)
        band = _up(k.band_bytes)
        rows = "y"
        if k.first:
            self.line(f"memcpy(y, {self.constant(k.first)}, {width});")
            rows = f"y + {width}"
            self.model_bytes += CALL_BYTES
        position = self.constant(k.position)
        if k.streamed:
            self.call(
                op, "", k.macs, "nc_patch_embed", own, k.bands, "image", "context", self.at(index), position, rows, self.at(index, band)
            )
            return
        for band_index in range(k.bands):
            at = k.columns * band_index * width
            residual = f"{position} + {at}" if k.position else "0"
            rows = f"y + {at + width * bool(k.first)}"
            self.call(op, "", k.macs // k.bands, "nc_patch_band", own, f"x + {band_index * k.band_bytes}", residual, rows, self.at(index))

    @write.register
    def _(self, k: p.Read, op: p.Operation, index: int) -> None:
        self.call(op, "", 0, "image", "context", 0, k.rows, "y")

    @write.register
    def _(self, k: p.Normalize, op: p.Operation, index: int) -> None:
        self.call(op, "", 0, "nc_layer_norm", self.norm(k.norm), "x", "y", k.rows)

    @write.register
    def _(self, k: p.Dense, op: p.Operation, index: int) -> None:
        function, own = self.map(k.map, k.map.outputs)
        residual = "x2" if len(op.inputs) > 1 else "0"
        if k.norm is None:
            self.call(op, "", k.macs, function, own, "x", k.rows, residual, "y", self.at(index))
            return
        tile = self.plan.tiles[index]
        self.line(f"int8_t *const normalized = {self.at(index)};")
        self.loop(k.rows, tile)
        self.call(op, "norm", 0, "nc_layer_norm", self.norm(k.norm), f"x + t * {k.norm.width}", "normalized", "n")
        residual = f"x2 + t * {k.map.outputs}" if len(op.inputs) > 1 else "0"
        work = self.at(index, _up(tile * k.map.inputs))
        self.call(op, "", k.macs, function, own, "normalized", "n", residual, f"y + t * {k.map.outputs}", work)
        self.end()

    @write.register
    def _(self, k: p.Mlp, op: p.Operation, index: int) -> None:
        tile, width = self.plan.tiles[index], k.norm.width
        hidden, rest = k.parts(tile)
        self.line(f"int8_t *const normalized = {self.at(index)};")
        self.line(f"int8_t *const hidden = {self.at(index, hidden)};")
        self.loop(k.rows, tile)
        self.call(op, "norm", 0, "nc_layer_norm", self.norm(k.norm), f"x + t * {width}", "normalized", "n")
        function, own = self.map(k.up, k.up.outputs)
        self.call(op, "up", k.rows * k.up.macs, function, own, "normalized", "n", "0", "hidden", self.at(index, rest))
        function, own = self.map(k.down, width)
        rows = (f"x + t * {width}", f"y + t * {width}")
        self.call(op, "down", k.rows * k.down.macs, function, own, "hidden", "n", *rows, self.at(index, rest))
        self.end()

    @write.register
    def _(self, k: p.Attend, op: p.Operation, index: int) -> None:
        tile = self.plan.tiles[index]
        values, normalized, rest = k.parts(tile)
        self.line(f"int8_t *const keys = {self.at(index)};")
        self.line(f"int8_t *const values = {self.at(index, values)};")
        if k.norm:
            self.line(f"int8_t *const normalized = {self.at(index, normalized)};")
        stride = k.width * len(k.heads)
        for number, head in enumerate(k.heads):
            self._keys_and_values(k, head, op, index, rest)
            fields = {
                "exp_table": self.constant(EXP_TABLE), "score_multiplier": head.score_multiplier, "ratio": f"{head.ratio}U",
                "value_zero": head.value_zero, "zero_point": head.zero_point, "tokens": k.tokens, "width": k.width, "q_stride": stride,
                "y_stride": stride,
            }  # fmt: skip
            own = self.struct("nc_attention_t", head.name, fields)
            at = number * k.width
            macs = 2 * k.rows * k.tokens * k.width
            work = self.at(index, normalized)
            self.call(op, "", macs, "nc_attention", own, f"x2 + {at}", "keys", "values", f"y + {at}", k.rows, work)

    def _keys_and_values(self, k: p.Attend, head: p.Head, op: p.Operation, index: int, rest: int) -> None:
        keys, own_keys = self.map(head.keys, 2 * _up(k.width, 4), "NC_KEYS")
        values, own_values = self.map(head.values, 2 * _up(k.tokens, 2), "NC_VALUES")
        work = self.at(index, rest)
        if k.norm is None:
            self.call(op, "keys", k.tokens * head.keys.macs, keys, own_keys, "x", k.tokens, "0", "keys", work)
            self.call(op, "values", k.tokens * head.values.macs, values, own_values, "x", k.tokens, "0", "values", work)
            return
        self.loop(k.tokens, self.plan.tiles[index])
        self.call(op, "norm", 0, "nc_layer_norm", self.norm(k.norm), f"x + t * {k.norm.width}", "normalized", "n")
        at = f"keys + NC_KEYS_AT(t, {k.width})"
        self.call(op, "keys", k.tokens * head.keys.macs, keys, own_keys, "normalized", "n", "0", at, work)
        self.call(op, "values", k.tokens * head.values.macs, values, own_values, "normalized", "n", "0", "values + NC_VALUES_AT(t)", work)
        self.end()

    @write.register
    def _(self, k: p.Split, op: p.Operation, index: int) -> None:
        stride = 2 * _up(k.maps[0].outputs, 4) if k.layout == "keys" else 2 * _up(k.rows, 2)
        for number, map_ in enumerate(k.maps):
            function, own = self.map(map_, stride, f"NC_{k.layout.upper()}")
            macs = k.rows * map_.macs
            self.call(op, "", macs, function, own, "x", k.rows, "0", f"y + {number * k.head_bytes}", self.at(index))

    @write.register
    def _(self, k: p.Scores, op: p.Operation, index: int) -> None:
        heads = len(k.products)
        own_bytes = _up(p.keys_bytes(k.tokens, k.width))
        for number, product in enumerate(k.products):
            own = self._product(product, k.width, k.tokens, k.width * heads, k.tokens, 0)
            y, macs = f"y + {number * k.rows * k.tokens}", k.rows * k.tokens * k.width
            self.call(op, "", macs, "nc_matmul", own, f"x + {number * k.width}", f"x2 + {number * own_bytes}", y, k.rows, self.at(index))

    @write.register
    def _(self, k: p.Mix, op: p.Operation, index: int) -> None:
        heads = len(k.products)
        own_bytes = _up(p.values_bytes(k.tokens, k.width))
        for number, product in enumerate(k.products):
            own = self._product(product, k.tokens, k.width, k.tokens, k.width * heads, 1)
            x, macs = f"x + {number * k.rows * k.tokens}", k.rows * k.tokens * k.width
            self.call(op, "", macs, "nc_matmul", own, x, f"x2 + {number * own_bytes}", f"y + {number * k.width}", k.rows, self.at(index))

    def _product(self, product: p.Product, inputs: int, outputs: int, x_stride: int, y_stride: int, of_values: int) -> str:
        fields = {
            "multiplier": product.multiplier, "w_zero": product.w_zero, "zero_point": product.zero_point, "inputs": inputs,
            "outputs": outputs, "x_stride": x_stride, "y_stride": y_stride, "of_values": of_values,
        }  # fmt: skip
        return self.struct("nc_matmul_t", product.name, fields)

    @write.register
    def _(self, k: p.Softmax, op: p.Operation, index: int) -> None:
        self.call(op, "", 0, "nc_softmax", self.constant(k.table), "x", "(uint8_t *)y", k.rows, k.width)

    @write.register
    def _(self, k: p.Lookup, op: p.Operation, index: int) -> None:
        self.call(op, "", 0, "nc_lookup", self.constant(k.table), "x", "y", k.count)

    @write.register
    def _(self, k: p.Add, op: p.Operation, index: int) -> None:
        fields = {"a_multiplier": k.a_multiplier, "b_multiplier": k.b_multiplier, "constant": k.constant}
        self.call(op, "", 0, "nc_add", self.struct("nc_add_t", op.name, fields), "x", "x2", "y", k.count)

    @write.register
    def _(self, k: p.Mean, op: p.Operation, index: int) -> None:
        fields = {
            "multiplier": k.multiplier, "x_zero": k.x_zero, "zero_point": k.zero_point, "rows": k.rows, "channels": k.channels,
            "x_stride": k.channels,
        }  # fmt: skip
        self.call(op, "", 0, "nc_mean", self.struct("nc_mean_t", op.name, fields), "x", "y")

    @write.register
    def _(self, k: p.Classify, op: p.Operation, index: int) -> None:
        own = self.struct("nc_linear_t", k.linear.name, self.linear_fields(k.linear, k.linear.outputs))
        self.call(op, "", k.macs, "nc_head", own, "x", "(int32_t *)(void *)y", self.at(index))

    @write.register
    def _(self, k: p.Conv, op: p.Operation, index: int) -> None:
        fields = {
            "linear": self.linear_fields(k.linear, k.linear.outputs), "x_zero": k.linear.x_zero, "height": k.height, "width": k.width,
            "channels": k.channels, "kernel": k.kernel, "stride": k.stride, "pad": k.pad,
        }  # fmt: skip
        own = self.struct("nc_conv_t", k.linear.name, fields)
        self.call(op, "", k.macs, "nc_conv", own, "x", "x2" if len(op.inputs) > 1 else "0", "y", self.at(index))

    @write.register
    def _(self, k: p.Depthwise, op: p.Operation, index: int) -> None:
        fields = {
            "weights": self.constant(f"{k.name}.packed"), "table": self.constant(k.table), "x_zero": k.x_zero, "zero_point": k.zero_point,
            "height": k.height, "width": k.width, "channels": k.channels, "stride": k.stride, "pad": k.pad,
        }  # fmt: skip
        self.call(op, "", k.macs, "nc_depthwise", self.struct("nc_depthwise_t", k.name, fields), "x", "y", self.at(index))

    @write.register
    def _(self, k: p.AveragePool, op: p.Operation, index: int) -> None:
        fields = {
            "multiplier": k.multiplier, "x_zero": k.x_zero, "zero_point": k.zero_point, "height": k.height, "width": k.width,
            "channels": k.channels, "kernel": k.kernel, "stride": k.stride,
        }  # fmt: skip
        self.call(op, "", 0, "nc_average_pool", self.struct("nc_average_pool_t", op.name, fields), "x", "y")


def source(program: p.Program, plan: Plan) -> Source:
    """The C of a program at its plan's offsets."""
    writer = written(program.structure, plan)
    arrays = {name: array_of(program, name) for name in writer.used}
    declarations = "".join(f"extern const {_c_type(a)} {identifier(n)}[{a.size}];\n" for n, a in arrays.items())
    header = f"/* Constants of {program.structure.name}, in the order that the kernels read them. */\n#ifndef NC_WEIGHTS_H\n"
    header += f"#define NC_WEIGHTS_H\n#include <stdint.h>\n\n{declarations}#endif\n"
    text = '#include "weights.h"\n' + "".join(f"\n{line}" for n, a in arrays.items() for line in _definition(n, a)) + "\n"
    sizes = weights_bytes(program.structure, writer.used)
    return Source(_model_text(writer), header, text, tuple(writer.counted), writer.functions, model_bytes(writer), sizes)


def written(structure: p.Structure, plan: Plan) -> Writer:
    """Calls and parameters; needs no constants."""
    writer = Writer(structure, plan)
    for index in range(len(structure.operations)):
        writer.operator(index)
    return writer


def model_bytes(writer: Writer) -> int:
    """Flash set aside for model.c: parameters, calls, names of what is counted."""
    return writer.model_bytes + _fixed_bytes(len(_names(writer)))


def shared_bytes(names: int) -> int:
    """Flash of a transformer's model.c and weights.c that belongs to no operator; `names`: bytes of all counters' names."""
    return FRAME_BYTES + _fixed_bytes(names + 1) + _up(_EXP_TABLE_BYTES)


def _fixed_bytes(names: int) -> int:
    return _up(names) + _up(len(COUNT_REMARK) + 3) + _up(STRUCTS["nc_model_t"])


def weights_bytes(structure: p.Structure, used: Mapping[str, None]) -> int:
    """Flash that weights.c takes, without packing anything."""
    sizes = _constant_sizes(structure)
    return sum(_up(sizes[name]) for name in used)


def packed_name(linear: p.Linear) -> str:
    return f"{linear.name}.packed"


def identifier(name: str) -> str:
    return name.replace(".", "_").replace("-", "_")


def array_of(program: p.Program, name: str) -> npt.NDArray[Any]:
    """A constant as it lies in flash."""
    if name == EXP_TABLE:
        return constants.exp_table()
    if name in program.constants:
        return program.constants[name]
    for linear, order in linears(program.structure):
        if packed_name(linear) == name:
            weights, bias, multiplier = (program.constants[part] for part in (linear.weights, linear.bias, linear.multiplier))
            return packing.linear(weights, bias, multiplier, linear.x_zero, order)
    kernel = next(op.kernel for op in program.structure.operations if getattr(op.kernel, "name", "") + ".packed" == name)
    assert isinstance(kernel, p.Depthwise)
    return packing.depthwise(*(program.constants[part] for part in (kernel.weights, kernel.bias, kernel.multiplier)))


def linears(structure: p.Structure) -> Iterator[tuple[p.Linear, Any]]:
    """Every linear map with the order its weights are packed in."""
    for op in structure.operations:
        for map_ in p.maps(op.kernel):
            if isinstance(map_, p.LowRank):
                yield map_.first, "quads"
                yield map_.second, "plain"
            else:
                yield map_, "quads"


def _constant_sizes(structure: p.Structure) -> dict[str, int]:
    """Bytes of every constant there can be, by what reads it."""
    found = {EXP_TABLE: _EXP_TABLE_BYTES}
    for linear, order in linears(structure):
        found[packed_name(linear)] = 4 * packing.linear_words(linear.outputs, linear.inputs, order)
        found |= {linear.table: 256} if linear.table else {}
    for op in structure.operations:
        match op.kernel:
            case p.Embed(position=position, first=first, linear=linear) as kernel:
                found |= {position: kernel.bands * kernel.columns * linear.outputs, first: linear.outputs}
            case p.Softmax(table=table):
                found[table] = 512
            case p.Lookup(table=table):
                found[table] = 256
            case p.Depthwise(name=name, table=table, channels=channels):
                found |= {f"{name}.packed": 4 * packing.depthwise_words(channels), table: 256}
        if norm := p.norm_of(op.kernel):
            found[norm.affine] = 8 * norm.width
    return found


def _model_text(writer: Writer) -> str:
    program, plan = writer.program, writer.plan
    output = program.tensor(program.output)
    word = output.size_bytes // int(np.prod(output.shape))
    names = "".join(f'    "{c.label}\\0"\n' for c in writer.counted)
    parts = [
        f"/* {program.name}: {program.macs:,} multiply-accumulates, an arena of {plan.arena_bytes:,} bytes. Written by nascompile. */",
        '#include "model.h"\n#include "weights.h"',
        "\n".join(writer.parameters.values()),
        '#ifdef __arm__\n#define ARENA __attribute__((section(".bss.arena")))\n#else\n#define ARENA\n#endif',
        f"static _Alignas(8) uint8_t arena[{plan.arena_bytes}] ARENA;\n#define AT(offset) ((int8_t *)(void *)(arena + (offset)))",
        f"static uint32_t counts[{len(writer.counted) + 1}];",
        f"static const char names[] =\n{names[:-1]};",
        f'static const char remark[] = "\\n{COUNT_REMARK}\\n";',
        "const nc_model_t model = "
        + _braces({
            "input_bytes": program.input_bytes, "row_bytes": program.image[1] * program.image[2],
            "output_bytes": output.size_bytes, "arena_bytes": plan.arena_bytes, "output_word": word, "operators": len(writer.counted),
            "names": "names", "counts": "counts", "remark": "remark",
        }) + ";",
        "const void *model_run(nc_row_source image, void *context)\n{" + "\n".join(writer.body).replace("\n\n", "\n", 1)
        + f"\n\n    return AT({plan.offsets[program.output]});\n}}\n",
    ]  # fmt: skip
    return "\n\n".join(parts)


def _names(writer: Writer) -> str:
    return "".join(f"{c.label}\0" for c in writer.counted) + "\0"


def _definition(name: str, array: npt.NDArray[Any]) -> list[str]:
    """A constant's definition: words in hexadecimal, the rest in decimal."""
    flat = array.ravel()
    words = [f"0x{value:08x}" for value in flat] if flat.dtype == np.uint32 else [str(value) for value in flat]
    per_line = 11 if flat.dtype == np.uint32 else 24
    lines = [f"    {', '.join(words[i : i + per_line])}," for i in range(0, len(words), per_line)]
    return [f"_Alignas({ALIGN}) const {_c_type(array)} {identifier(name)}[{array.size}] = {{", *lines, "};"]


def _c_type(array: npt.NDArray[Any]) -> str:
    return f"{array.dtype.name}_t"


def _braces(fields: Mapping[str, Any]) -> str:
    parts = [f".{key} = {_braces(value) if isinstance(value, Mapping) else value}" for key, value in fields.items()]
    return "{" + ", ".join(parts) + "}"


def _up(size: int, multiple: int = ALIGN) -> int:
    return -(-size // multiple) * multiple

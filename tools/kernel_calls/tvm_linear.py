"""Compiles one INT8 linear map with Apache TVM for a Cortex-M7: `python tvm_linear.py TOKENS INPUTS OUTPUTS FOLDER`.

Runs in any environment with apache-tvm and imports nothing of this repository. Writes FOLDER/FORM-SCHEDULE.o for two forms and several
schedules, and prints JSON: TVM's version, the objects, and what did not compile and why.

`sums`: int32 sums, no bias, no requantization. `int8`: bias, requantization and saturation too, the bytes of nc_linear.
`default`: TVM's own schedule. `bytes-T-O`: tiles of T tokens and O outputs, sums in registers. `halves-T-O`: the same with weights
stored as 16 bits and tokens widened beforehand, so that LLVM may multiply two pairs at once.

The function in an object is `linear_compute_(x, weight, y[, constants, sums][, wide])`, local; `objcopy --globalize-symbol` shows it.
`sums` (int32) and `wide` (the tokens as int16) are memory that it writes.
"""

import json
import sys
from pathlib import Path

import tvm
from tvm import te
from tvm.s_tir import Schedule

TARGET = {"kind": "llvm", "mtriple": "thumbv7em-none-eabihf", "mcpu": "cortex-m7"}
FORMS = ("sums", "int8")
TILES = ((2, 2), (2, 4), (4, 2), (4, 4))
UNROLLED = 8
"""Inputs in a row, of a tile."""


def map_of(tokens, inputs, outputs, form, halves):
    """The map as a function of TVM's IR. What is computed on the way goes to further arguments: memory of its own needs a heap."""
    x = te.placeholder((tokens, inputs), "int8", name="x")
    weight = te.placeholder((outputs, inputs), "int16" if halves else "int8", name="weight")
    constants = te.placeholder((2, outputs), "int32", name="constants")
    k = te.reduce_axis((0, inputs), "k")
    wide = te.compute((tokens, inputs), lambda t, i: x[t, i].astype("int16"), name="wide") if halves else x

    def product(t, o):
        return te.sum(wide[t, k].astype("int32") * weight[o, k].astype("int32"), axis=k)

    sums = te.compute((tokens, outputs), product, name="sums")

    def requantized(t, o):
        scaled = (sums[t, o] + constants[0, o]).astype("int64") * constants[1, o].astype("int64")
        rounded = ((scaled + (1 << 31)) >> 32).astype("int32")
        return te.max(te.min(rounded, 127), -128).astype("int8")

    results = [sums] if form == "sums" else [te.compute((tokens, outputs), requantized, name="y"), constants, sums]
    return te.create_prim_func([x, weight, *results, *([wide] if halves else [])])


def tiled(function, tokens, outputs, form):
    """Sums of a tile in registers over all inputs, requantized behind that."""
    schedule = Schedule(tvm.IRModule({"linear": function}))
    schedule.work_on("linear")
    block = schedule.get_sblock("sums")
    t, o, k = schedule.get_loops(block)
    t, ti = schedule.split(t, [None, tokens])
    o, oi = schedule.split(o, [None, outputs])
    k, ki = schedule.split(k, [None, UNROLLED])
    schedule.reorder(t, o, k, ti, oi, ki)
    for loop in (ti, oi, ki):
        schedule.unroll(loop)
    if form == "int8":
        schedule.reverse_compute_at(schedule.get_sblock("y"), o)
        for loop in schedule.get_loops(schedule.get_sblock("y"))[2:]:
            schedule.unroll(loop)
    initial = schedule.decompose_reduction(block, k)
    for loop in schedule.get_loops(initial)[2:]:
        schedule.unroll(loop)
    return schedule.mod


def main():
    tokens, inputs, outputs = map(int, sys.argv[1:4])
    objects, failed = [], {}
    for form in FORMS:
        plain = map_of(tokens, inputs, outputs, form, False)
        makers = {"default": lambda plain=plain: tvm.IRModule({"linear": plain})}
        for halves in (False, True):
            for tile in TILES:
                function = map_of(tokens, inputs, outputs, form, halves)
                name = f"{'halves' if halves else 'bytes'}-{tile[0]}-{tile[1]}"
                makers[name] = lambda function=function, tile=tile, form=form: tiled(function, *tile, form)
        for schedule, make in makers.items():
            name = f"{form}-{schedule}"
            try:
                module = tvm.IRModule({"linear": make()["linear"].with_attr("global_symbol", "linear")})
                tvm.compile(module, target=tvm.target.Target(TARGET)).mod.write_to_file(str(Path(sys.argv[4]) / f"{name}.o"))
                objects.append(name)
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {error}"[-300:]
    print(json.dumps({"tvm": tvm.__version__, "objects": objects, "failed": failed}))


if __name__ == "__main__":
    main()

"""Compiles one INT8 matrix product with Apache TVM for a Cortex-M7: `python tvm_linear.py TOKENS INPUTS OUTPUTS OUT.o`.

Runs in any environment with apache-tvm and imports nothing of this repository. The default schedule, int32 sums as output: no bias, no
requantization. The function in the object is `linear_compute_(x, weight, y)`, local: `objcopy --globalize-symbol` makes it callable.
"""

import sys

import tvm
from tvm import te

tokens, inputs, outputs = map(int, sys.argv[1:4])
x, weight = te.placeholder((tokens, inputs), "int8", name="x"), te.placeholder((outputs, inputs), "int8", name="weight")
k = te.reduce_axis((0, inputs), "k")
y = te.compute((tokens, outputs), lambda t, o: te.sum(x[t, k].astype("int32") * weight[o, k].astype("int32"), axis=k), name="y")
module = tvm.IRModule({"linear": te.create_prim_func([x, weight, y]).with_attr("global_symbol", "linear")})
target = tvm.target.Target({"kind": "llvm", "mtriple": "thumbv7em-none-eabihf", "mcpu": "cortex-m7"})
tvm.compile(module, target=target).mod.write_to_file(sys.argv[4])
print(tvm.__version__)

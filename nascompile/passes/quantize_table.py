"""Embedding tables stored as int8 rows with a scale per row; a fetched row is scale · integers, in float32."""

from __future__ import annotations

import onnx

from nascompile import plugins
from nascompile.passes import PassContext
from nascompile.passes.graph import INT8, SCALE, Graph, attribute


class QuantizeTable:
    name = "quantize_table"
    standard = True
    exact = False
    requires = "weights are bound as initializers"
    ensures = "every quantized table is read by two Gathers, of int8 rows and of float32 scales, multiplied"

    def apply(self, model: onnx.ModelProto, context: PassContext) -> onnx.ModelProto:
        graph = Graph(model)
        for node in [n for n in graph.nodes if n.op_type == "Gather" and n.input[0] in context.quantized]:
            table, indices = node.input
            value = graph.constant(table)
            if value is None or attribute(node, "axis", 0) != 0:
                continue
            integers, scale = plugins.get("quantization", context.quantized[table]).quantize_weight(value)
            graph.add_constant(table + INT8, integers)
            graph.add_constant(table + SCALE, scale[:, None])  # (rows, 1): a fetched scale broadcasts over its row
            base = node.name.rpartition("/")[0]
            rows, floats, scales = (f"{base}/{part}_output_0" for part in ("Rows", "Cast", "Scales"))
            graph.replace(
                [node],
                [
                    graph.node("Gather", node.name, [table + INT8, indices], [rows]),
                    graph.node("Gather", f"{base}/Gather_scale", [table + SCALE, indices], [scales]),
                    graph.node("Cast", f"{base}/Cast", [rows], [floats], to=onnx.TensorProto.FLOAT),
                    graph.node("Mul", f"{base}/Mul", [floats, scales], [node.output[0]]),
                ],
            )
        return graph.finish()


PLUGIN = QuantizeTable()

"""Costs of many candidates at once against the operator graph of each."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import BertConfig

from nascompile import network, plugins, space as spaces
from nascompile.families.toy import ToyConfig
from nascompile.latency_table import predict
from nascompile.records import Environment, LatencyTable, Quantity, TableCorrection, TableRow, Target
from nascompile.search import Pricing

CONFIGS = {
    "bert": lambda: BertConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=4, intermediate_size=32, vocab_size=40, num_labels=3,
        max_position_embeddings=20,
    ),
    "toy": lambda: ToyConfig(features=6, hidden=8, width=16, rank=4, layers=3, num_labels=5),
}  # fmt: skip


class Backend:
    name, width_multiple = "made-up", 8

    def supports(self, precision) -> str:
        return ""


def make(name: str, corrected: bool) -> Pricing:
    """Every row has a time of its own; a precision that finds its ranges in a call decides what the last layer computes."""
    family, config, backend = plugins.get("families", name), CONFIGS[name](), Backend()
    target = Target(device="d", backend=backend.name, workload=family.workload(config, 1, 7))
    space = network.search_space(family, config, backend, target, "model", (2, 0, 1), ("int8", "int8-dynamic"))
    rng = np.random.default_rng(0)
    rows = tuple(
        TableRow(
            operator=operator, latency=Quantity(value=float(rng.uniform(0.1, 1)), unit="ms", kind="measured", n=9),
            footprint=1000 * corrected, reach=((5.0, 0.0), (12.0, 0.3)) if corrected else (),
        )
        for operator in network.operators(family, config, space, target)
    )  # fmt: skip
    correction = TableCorrection(change_ms=0.07, block_ms=(("int8", 0.01),), reach=((8.0, 0.0), (14.0, 1e-5))) if corrected else None
    call = Quantity(value=0.05, unit="ms", kind="measured", n=9)
    table = LatencyTable(
        target=target, environment=Environment(must_match=()), rows=rows, call=call, scale=1.1, correction=correction
    )
    return Pricing(family, config, space, target, table, structure_bytes=123)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("corrected", [False, True])
def test_costs_are_those_of_the_graph(name, corrected):
    pricing, rng = make(name, corrected), np.random.default_rng(1)
    points = [spaces.sample(pricing.space, rng) for _ in range(60)]
    assert len({predict(pricing.table, graph_of(pricing, p)).value for p in points}) > 30
    for point in (*points, *points[:5]):
        graph = graph_of(pricing, point)
        assert pricing.costs(point) == pricing(point)[0] == {
            "latency_ms": predict(pricing.table, graph).value,
            "size_mb": (123 + sum(node.size_bytes for node in graph.nodes)) / 1e6,
            "macs_m": sum(node.macs for node in graph.nodes) / 1e6,
            "memory_mb": (sum(node.size_bytes for node in graph.nodes) + max(node.activation_bytes for node in graph.nodes)) / 1e6,
        }  # fmt: skip


def graph_of(pricing, point):
    return network.graph(pricing.family, pricing.config, pricing.space, point, pricing.target)

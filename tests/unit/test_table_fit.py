"""What is fitted to stacks and to whole networks, against networks whose every part is known."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest

from nascompile import latency_table, table_fit
from nascompile.records import FLOAT32, INT8, Environment, LatencyTable, Node, Operator, OperatorGraph, Quantity, TableRow, Target, Workload

TARGET = Target(device="cpu", backend="onnxruntime", workload=Workload())
WIDTHS = (64, 128, 256)
OPERATORS = {(w, p == INT8): Operator(kind="mlp", dims=(("width", w),), precision=p) for w in WIDTHS for p in (FLOAT32, INT8)}


def quantity(value: float) -> Quantity:
    return Quantity(value=value, unit="ms", kind="measured", n=9, quantiles=((0.1, value), (0.5, value)))


def size(width: int, q: bool) -> int:
    return width * (1 if q else 4)


ROWS = tuple(
    TableRow(operator=o, latency=quantity(w / 100 / (2 if q else 1)), footprint=4096, reach=((10.0, -w / 400), (12.0, 0.0)))
    for (w, q), o in OPERATORS.items()
)
TABLE = LatencyTable(target=TARGET, environment=Environment(must_match=()), rows=ROWS, call=quantity(0.1))


def networks(count: int) -> list[OperatorGraph]:
    rng = np.random.default_rng(0)
    found = []
    for i in range(count):
        blocks = [(int(rng.choice(WIDTHS)), bool(rng.integers(2)) if i % 3 == 2 else i % 3 == 1) for _ in range(rng.integers(2, 7))]
        nodes = (Node(name=str(j), operator=OPERATORS[b], module="", size_bytes=size(*b)) for j, b in enumerate(blocks))
        found.append(OperatorGraph(nodes=tuple(nodes)))
    return found


def truth(graph: OperatorGraph, scale=1.0, change=0.0, integers=1.0, byte=0.0) -> float:
    """`byte`: ms of each byte in a network of 4096 more than in one of 1024."""
    whole = sum(n.size_bytes for n in graph.nodes)
    more = byte * min(0.0, max(-1.0, math.log2(whole / 4096) / 2))
    spent = 0.1 + change * latency_table.changes(graph) + whole * more
    for n in graph.nodes:
        row = next(r for r in ROWS if r.operator == n.operator)
        spent += (row.latency.value + latency_table.at(row.reach, whole)) * (integers if n.operator.precision == INT8 else 1.0)
    return scale * spent


def test_a_correction_finds_what_the_rows_leave_out():
    graphs = networks(30)
    times = [truth(g, scale=1.06, change=0.08, integers=0.93, byte=1e-4) for g in graphs]
    fitted, _ = table_fit.fit(TABLE, graphs, times)
    assert fitted.correction is not None
    others = networks(60)[30:]
    errors = [latency_table.predict(fitted, g).value / truth(g, 1.06, 0.08, 0.93, 1e-4) - 1 for g in others]
    plain = [latency_table.predict(TABLE, g).value / truth(g, 1.06, 0.08, 0.93, 1e-4) - 1 for g in others]
    assert max(map(abs, errors)) < 0.02 < 0.05 < max(map(abs, plain))
    factors = dict(fitted.correction.factors)
    assert factors["mlp int8"] / factors["mlp fp32"] == pytest.approx(0.93, abs=0.02)
    assert fitted.correction.change_ms == pytest.approx(0.08, abs=0.01)


def test_one_disturbed_network_does_not_bend_it():
    graphs = networks(30)
    times = [truth(g, change=0.08) * (1.6 if i == 4 else 1.0) for i, g in enumerate(graphs)]
    fitted, _ = table_fit.fit(TABLE, graphs, times)
    errors = [latency_table.predict(fitted, g).value / truth(g, change=0.08) - 1 for g in networks(60)[30:]]
    assert max(map(abs, errors)) < 0.02


def test_what_does_not_help_is_left_alone():
    graphs = networks(5)
    same, left_out = table_fit.fit(msgspec.structs.replace(TABLE, scale=3.0), graphs, [truth(g) for g in graphs])
    assert (same.scale, same.correction) == (1.0, None), "whatever the table had before"
    scaled, left_out_scaled = table_fit.fit(TABLE, graphs, [1.2 * truth(g) for g in graphs])
    assert scaled.scale == pytest.approx(1.2)
    assert left_out == pytest.approx([truth(g) for g in graphs])
    assert left_out_scaled == pytest.approx([1.2 * truth(g) for g in graphs])
    assert scaled.correction is None, "too few networks for more"
    noise = (1.03, 0.97, 1.0, 1.0)
    assert table_fit.fit(TABLE, graphs[:4], [f * truth(g) for f, g in zip(noise, graphs, strict=False)])[0].scale == 1.0
    assert table_fit.fit(TABLE, graphs[:2], [1.2 * truth(g) for g in graphs[:2]])[0].scale == 1.0, "too few to tell"


def test_reach_is_what_a_byte_costs_more_in_deeper_stacks():
    def stack(copies: int) -> float:
        place = math.log2(copies * 1000)
        return copies * (0.5 + 1000 * 1e-4 * min(1.0, max(0.0, place - 12)))

    line = table_fit.reach(1000, [(n, stack(n)) for n in (16, 1, 2, 8, 4)])
    assert [round(2**place) for place, _ in line] == [1000, 2000, 4000, 8000, 16000]
    expected = [(stack(n) / n - 0.5) / 1000 for n in (1, 2, 4, 8, 16)]
    assert [cost for _, cost in line] == pytest.approx(expected, abs=1e-9)
    falling = table_fit.reach(1000, [(1, 1.0), (4, 3.9), (16, 16.1)])
    assert [cost for _, cost in falling] == sorted(cost for _, cost in falling), "noise does not make more bytes cheaper"
    assert table_fit.reach(1000, [(4, 1.0)]) == ()
    assert table_fit.reach(0, [(4, 1.0), (8, 2.0)]) == ()

"""What makes a table unsound, one fault at a time, and what does not."""

from __future__ import annotations

import math

import msgspec
import pytest

from nascompile import latency_table, table_check
from nascompile.errors import TableError
from nascompile.records import (
    Candidate,
    Environment,
    LatencyTable,
    Operator,
    Quantity,
    Residual,
    TableCorrection,
    TableRow,
    Target,
    Workload,
)  # fmt: skip

TARGET = Target(device="cpu", backend="onnxruntime", workload=Workload())
MLP, HEAD = (Operator(kind=kind, dims=(("width", 8),)) for kind in ("mlp", "head"))


def ms(value: float, **fields: object) -> Quantity:
    quantiles = ((0.1, value), (0.5, 1.02 * value), (0.9, 1.1 * value))
    return Quantity(**({"value": value, "unit": "ms", "kind": "measured", "n": 30, "quantiles": quantiles} | fields))


def network(name: str, predicted: float, measured: float) -> Residual:
    return Residual(candidate=Candidate(space=name, architecture=(), precision=()), predicted_ms=predicted, measured=ms(measured))


def rows(*latencies: tuple[Operator, Quantity]) -> tuple[TableRow, ...]:
    return tuple(TableRow(operator=operator, latency=latency) for operator, latency in latencies)


VALIDATION = tuple(network(name, 1.0, 1 + error) for name, error in (("a", 0.02), ("b", -0.03), ("c", 0.01), ("d", 0.0)))
SOUND = LatencyTable(
    target=TARGET, environment=Environment(must_match=()), rows=rows((MLP, ms(1.0)), (HEAD, ms(0.0))), call=ms(0.1), scale=1.1,
    calibration=(network("e", 1.0, 1.1),), validation=VALIDATION, relative_error=latency_table.interval_half_width(VALIDATION)[0],
)  # fmt: skip


def test_a_sound_table_has_no_faults():
    assert table_check.faults(SOUND) == ()
    table_check.check(SOUND)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rows": ()}, "no rows"),
        ({"rows": rows((MLP, ms(1.0)), (MLP, ms(2.0)))}, "2 rows of one operator: mlp width=8"),
        ({"rows": rows((MLP, ms(-1.0, quantiles=())))}, "mlp width=8 [fp32]: not a latency: -1.0 ms"),
        ({"rows": rows((MLP, ms(math.nan, quantiles=())))}, "not a latency: nan"),
        ({"rows": rows((MLP, ms(math.inf, quantiles=())))}, "not a latency: inf"),
        ({"rows": rows((MLP, ms(1.0, unit="us")))}, "its unit is us"),
        ({"rows": rows((MLP, ms(1.0, n=0)))}, "rests on 0 samples"),
        ({"rows": rows((MLP, ms(1.0, quantiles=((0.1, 1.0), (0.5, 0.9)))))}, "quantiles are not ascending: 1, 0.9 ms"),
        ({"rows": rows((MLP, ms(1.0, quantiles=((0.5, 1.0), (0.1, 1.0)))))}, "levels are not ascending between 0 and 1: 0.5, 0.1"),
        ({"rows": rows((MLP, ms(1.0, quantiles=((0.1, 1.0), (0.5, math.nan)))))}, "quantiles are not ascending"),
        ({"rows": rows((MLP, ms(3.0, quantiles=((0.1, 1.0), (0.5, 2.0)))))}, "3 ms lies outside its quantiles, 1 to 2 ms"),
        ({"call": ms(-0.5, quantiles=())}, "call: not a latency"),
        ({"scale": 0.0}, "scale is 0.0"),
        ({"scale": math.nan}, "scale is nan"),
        ({"drift": -1.0}, "drift is -1.0"),
        ({"seconds": math.inf}, "seconds is inf"),
        ({"relative_error": math.inf}, "relative_error is inf"),
        ({"calibration": (network("e", 0.0, 1.0),)}, "predicted 0.0 ms"),
        ({"calibration": (network("e", 1.0, 0.0),)}, "took no time"),
        ({"correction": TableCorrection(factors=(("mlp fp32", 0.0),))}, "takes a group of rows for free"),
        ({"correction": TableCorrection(change_ms=math.nan)}, "its correction is not a number"),
        ({"correction": TableCorrection(reach=((12.0, 0.0), (11.0, 1.0)))}, "the points of its correction do not ascend: 12, 11"),
        ({"rows": (msgspec.structs.replace(SOUND.rows[0], reach=((12.0, 0.0), (12.0, 1.0))),)}, "or its line over 12, 12 cannot be"),
        ({"validation": (), "relative_error": 0.05}, "rests on nothing"),
        ({"relative_error": 0.01}, "its interval, ±1.0 %, is narrower than its validation networks allow"),
    ],
)
def test_each_fault_is_named(change, says):
    found = table_check.faults(msgspec.structs.replace(SOUND, **change))
    assert [says in fault for fault in found] == [True], found
    with pytest.raises(TableError, match="not sound: 1 fault\n") as caught:
        table_check.check(msgspec.structs.replace(SOUND, **change))
    assert says in caught.value.detail


def test_all_faults_are_named_together():
    broken = msgspec.structs.replace(SOUND, scale=-1.0, drift=math.nan, rows=rows((MLP, ms(-1.0, quantiles=()))))
    with pytest.raises(TableError) as caught:
        table_check.check(broken)
    assert len(caught.value.detail.splitlines()) == 3
    assert "3 faults" in caught.value.message


def test_the_only_network_of_a_space_may_do_both_where_nothing_was_fitted():
    one = (network("a", 1.0, 1.0),)
    assert table_check.faults(msgspec.structs.replace(SOUND, scale=1.0, calibration=one, validation=one, relative_error=0.01)) == ()


def test_an_interval_from_the_quiet_networks_alone_is_accepted():
    """The profiler leaves disturbed networks out where enough others are left."""
    disturbed = Residual(candidate=VALIDATION[0].candidate, predicted_ms=1.0, measured=ms(1.5, quantiles=((0.1, 1.5), (0.5, 3.0))))
    table = msgspec.structs.replace(SOUND, validation=(disturbed, *VALIDATION[1:]))
    assert "narrower" in table_check.faults(msgspec.structs.replace(table, relative_error=0.015))[0]
    half, _ = latency_table.interval_half_width(VALIDATION[1:])
    assert table_check.faults(msgspec.structs.replace(table, relative_error=half)) == ()


def test_a_merged_table_is_sound():
    other = msgspec.structs.replace(SOUND, rows=rows((MLP, ms(0.9))), scale=1.0, relative_error=0.2, validation=(network("a", 1, 1.15),))
    merged = latency_table.merge(SOUND, other)
    assert table_check.faults(merged) == ()
    assert table_check.faults(latency_table.merge(other, SOUND)) == ()

"""Prediction, refusal, look-up and merging on tables made by hand."""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path

import msgspec
import pytest

from nascompile import latency_table, places, records
from nascompile.errors import TableError
from nascompile.records import (
    INT8,
    Candidate,
    Environment,
    LatencyTable,
    Node,
    Operator,
    OperatorGraph,
    Quantity,
    Residual,
    TableCorrection,
    TableRow,
    Target,
    Workload,
)  # fmt: skip

TARGET = Target(device="cpu", backend="onnxruntime", workload=Workload(sequence=50, resolution=(28, 28)), threads=2)
HERE = Environment(must_match=(("cpu", "A"), ("threads", 2)), recorded=(("os", "x"),))
HEAD = Operator(kind="head", dims=(("batch", 1),))
MLP = Operator(kind="mlp", dims=(("width", 64),))
MLP8 = Operator(kind="mlp", dims=(("width", 64),), precision=INT8)


def ms(value: float, spread: float = 0.0) -> Quantity:
    return Quantity(value=value, unit="ms", kind="measured", n=50, quantiles=((0.1, value), (0.5, value * (1 + spread))))


def table(timed: dict[Operator, float], **fields) -> LatencyTable:
    made = tuple(TableRow(operator=o, latency=ms(v)) for o, v in timed.items())
    return LatencyTable(**({"target": TARGET, "environment": HERE, "rows": made} | fields))


def graph(*operators: Operator) -> OperatorGraph:
    return OperatorGraph(nodes=tuple(Node(name=str(i), operator=o, module="") for i, o in enumerate(operators)))


def residual(predicted: float, measured: float) -> Residual:
    return Residual(candidate=Candidate(space="s", architecture=(), precision=()), predicted_ms=predicted, measured=ms(measured))


def test_prediction_counts_each_node_and_the_call_once():
    made = table({HEAD: 0.5, MLP: 2.0, MLP8: 0.75}, call=ms(0.25), scale=2.0, relative_error=0.1)
    got = latency_table.predict(made, graph(MLP, MLP8, MLP8, HEAD))
    assert got.value == pytest.approx(2 * (0.25 + 2.0 + 2 * 0.75 + 0.5))
    assert (got.low, got.high, got.unit, got.level) == (pytest.approx(8.5 * 0.9), pytest.approx(8.5 * 1.1), "ms", 0.9)


def test_a_missing_operator_is_named_with_what_adds_it():
    made = table({HEAD: 0.5, MLP: 2.0})
    with pytest.raises(TableError) as caught:
        latency_table.predict(made, graph(MLP, MLP8, MLP8, HEAD))
    assert "lacks 1 of" in caught.value.message
    assert MLP8.label in caught.value.detail
    assert "nascompile profile" in caught.value.hint
    assert latency_table.missing(made, (MLP8, MLP, MLP8)) == (MLP8,)
    assert latency_table.missing(None, (MLP, MLP8, MLP)) == (MLP, MLP8)


def test_a_table_of_another_machine_is_refused():
    other = Environment(must_match=(("cpu", "B"), ("threads", 2), ("onnxruntime", "1.31.1")), recorded=(("os", "y"),))
    with pytest.raises(TableError) as caught:
        latency_table.check_environment(table({HEAD: 1.0}), other)
    assert "cpu: table has A, here it is B" in caught.value.detail
    assert "onnxruntime: table has None, here it is 1.31.1" in caught.value.detail
    assert "threads" not in caught.value.message
    assert "profile" in caught.value.hint
    latency_table.check_environment(table({HEAD: 1.0}), other, allow_foreign=True)
    latency_table.check_environment(table({HEAD: 1.0}), Environment(must_match=HERE.must_match, recorded=(("os", "z"),)))


def test_a_row_costs_what_it_does_in_a_network_of_that_size_and_a_change_of_precision_more():
    rows = (
        TableRow(operator=MLP, latency=ms(2.0), footprint=4096, reach=((10.0, -1.0), (12.0, 0.0), (13.0, 0.5))),
        TableRow(operator=MLP8, latency=ms(0.75), footprint=1024, reach=((10.0, 0.0),)),
        TableRow(operator=HEAD, latency=ms(0.5), reach=()),
    )
    correction = TableCorrection(factors=(("mlp fp32", 1.5), ("mlp int8", 1.0)), change_ms=0.25, reach=((11.0, 0.0), (12.0, 1e-3)))
    made = msgspec.structs.replace(table({}, call=ms(0.25), scale=2.0), rows=rows, correction=correction)

    def of(*sizes: int) -> OperatorGraph:
        nodes = (Node(name=str(i), operator=MLP8 if i else MLP, module="", size_bytes=size) for i, size in enumerate(sizes))
        return OperatorGraph(nodes=(*nodes, Node(name="head", operator=HEAD, module="", size_bytes=10**6)))

    def expected(mlp: float, bytes_: float) -> float:
        """The head has no factor, and is a change of precision."""
        return 2 * (0.25 + 1.5 * mlp + 0.75 + 0.5 + 2 * 0.25 + bytes_)

    assert latency_table.predict(made, of(1024, 1024)).value == pytest.approx(expected(2.0 - 0.5, -1.024)), "half way between the points"
    assert latency_table.predict(made, of(8, 16)).value == pytest.approx(expected(2.0 - 1.0, -0.008)), "constant below"
    assert latency_table.predict(made, of(2**20, 1)).value == pytest.approx(expected(2.0 + 0.5, 0.001)), "and above"
    plain = msgspec.structs.replace(made, correction=None, scale=1.0)
    assert latency_table.predict(plain, of(2048, 2048)).value == pytest.approx(0.25 + 2.0 + 0.75 + 0.5)


def test_interval_half_width_uses_students_t():
    from scipy.stats import t

    errors = (0.03, -0.02, 0.04, 0.01)
    rms = (sum(e * e for e in errors) / 4) ** 0.5
    few = latency_table.interval_half_width([residual(2.0, 2.0 * (1 + e)) for e in errors])
    assert few == (pytest.approx(rms * t.ppf(0.95, 4), rel=1e-3), 0.0)
    assert latency_table.interval_half_width([residual(1.0, 1.0)] * 5) == (latency_table.FLOOR, 0.0)
    assert latency_table.interval_half_width([]) == (float("inf"), 0.0)
    relative, ms = latency_table.interval_half_width([residual(1.0, 1.1)] * 25)
    assert math.hypot(relative, ms) == pytest.approx(0.1 * t.ppf(0.95, 25), rel=0.02)


def test_the_interval_is_wider_for_short_calls_where_their_errors_are():
    """Errors of 1 % and of 0.02 ms, drawn at random: both parts are found again."""
    rng = random.Random(0)
    predicted = [0.2 * 1.12**i for i in range(36)]
    drawn = [residual(p, p + rng.gauss(0, 0.01) * p + rng.gauss(0, 0.02)) for p in predicted]
    relative, ms = latency_table.interval_half_width(drawn)
    made = table({MLP: 1.0}, relative_error=relative, absolute_error_ms=ms, validation=tuple(drawn))
    for p, least, most in ((0.2, 0.09, 0.27), (10.0, 0.008, 0.03)):
        assert least < latency_table.half_width(made, p) / p < most
    inside = sum(abs(r.measured.value - r.predicted_ms) <= latency_table.half_width(made, r.predicted_ms) for r in drawn)
    assert 30 <= inside < 36
    assert latency_table.error_text(made).endswith(" ms")
    middle = (predicted[17] + predicted[18]) / 2
    assert latency_table.typical_error(made) == pytest.approx(latency_table.half_width(made, middle) / middle)


def test_lookup_order(tmp_path, monkeypatch):
    places_of = {name: tmp_path / name for name in ("explicit", "cwd", "user")}
    for path in places_of.values():
        path.mkdir()
    monkeypatch.chdir(places_of["cwd"])
    monkeypatch.setattr(places.platformdirs, "user_data_path", lambda name: places_of["user"])
    order = places.folders(places.TABLES, places_of["explicit"])
    assert order[:3] == (places_of["explicit"], places_of["cwd"] / "latency_tables", places_of["user"] / "latency_tables")
    assert latency_table.find(TARGET, HERE, (MLP,)) is None

    in_user, in_cwd, explicit = (table({MLP: v}) for v in (1.0, 2.0, 3.0))
    for made, folder in ((in_user, order[2]), (in_cwd, order[1]), (explicit, order[0])):
        records.save(made, latency_table.path_for(folder, made))
        found = latency_table.find(TARGET, HERE, (MLP,), places_of["explicit"])
        assert found
        assert found.table == made
        assert found.path.is_relative_to(folder)
        assert not found.missing
    assert latency_table.find(TARGET, HERE, (MLP,)).table == in_cwd

    complete = table({MLP: 9.0, MLP8: 1.0})
    records.save(complete, latency_table.path_for(order[2], complete))
    assert latency_table.find(TARGET, HERE, (MLP, MLP8), places_of["explicit"]).table == complete, "complete beats near"
    elsewhere = Environment(must_match=(("cpu", "B"), ("threads", 2)))
    assert latency_table.find(TARGET, elsewhere, (MLP,)) is None
    (order[0] / "cpu" / "onnxruntime-broken.json").write_text("{")
    assert latency_table.find(TARGET, HERE, (MLP,), places_of["explicit"]).table == explicit


def test_a_named_file_must_fit(tmp_path):
    made = table({MLP: 1.0})
    path = tmp_path / "mine.json"
    records.save(made, path)
    assert latency_table.find(TARGET, HERE, (MLP, MLP8), path).missing == (MLP8,)
    with pytest.raises(TableError, match="other cpu"):
        latency_table.find(TARGET, Environment(must_match=(("cpu", "B"), ("threads", 2))), (MLP,), path)
    with pytest.raises(TableError, match="another target"):
        latency_table.find(msgspec.structs.replace(TARGET, threads=1), HERE, (MLP,), path)


def test_new_tables_go_to_the_first_writable_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocked = tmp_path / "file"
    blocked.write_text("a file, so no folder can be made below it")
    path = latency_table.store(table({MLP: 1.0}), blocked)
    assert path.parent == tmp_path / "latency_tables" / "cpu"
    assert path.name.startswith("onnxruntime-forward-b1-s50-28x28-t2-")
    assert path.suffix == ".json"
    assert latency_table.store(table({MLP: 1.0}), tmp_path / "mine").parent == tmp_path / "mine" / "cpu"
    assert latency_table.store(table({MLP: 2.0})) != path, "another table never overwrites one"


def test_nothing_is_written_beside_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    package = Path(latency_table.__file__).parent
    monkeypatch.setattr(places, "_can_write", lambda folder: folder.is_relative_to(package) or folder.is_relative_to(package.parent))
    with pytest.raises(Exception, match="can be written"):
        places.writable(places.TABLES)


def test_merge_keeps_the_quieter_row_and_bakes_the_scale_in():
    a = table({MLP: 1.0}, scale=2.0, relative_error=0.02, call=ms(0.1, 0.5))
    quiet = tuple(TableRow(operator=o, latency=ms(v, s)) for o, v, s in ((MLP, 9.0, 0.2), (MLP8, 0.5, 0.1)))
    b = table({}, rows=quiet, relative_error=0.05, call=ms(0.3, 0.1))
    merged = latency_table.merge(a, b)
    assert {row.operator: row.latency.value for row in merged.rows} == {MLP: 2.0, MLP8: 0.5}
    assert (merged.scale, merged.relative_error, merged.call.value) == (1.0, 0.05, 0.3)
    assert latency_table.predict(merged, graph(MLP)).value == pytest.approx(2.3)
    assert merged.environment.must_match == HERE.must_match
    parts = f"{records.digest(a)[:8]} {records.digest(b)[:8]}"
    assert merged.environment.recorded == (*HERE.recorded, (latency_table.MERGED, parts))
    again = latency_table.merge(merged, b)
    assert dict(again.environment.recorded)[latency_table.MERGED].split()[0] == records.digest(merged)[:8]
    assert len(again.environment.recorded) == len(merged.environment.recorded)
    with pytest.raises(TableError, match="other cpu"):
        latency_table.merge(a, table({}, environment=Environment(must_match=(("cpu", "B"), ("threads", 2)))))
    with pytest.raises(TableError, match="two targets"):
        latency_table.merge(a, table({}, target=msgspec.structs.replace(TARGET, threads=1)))


def test_diff():
    a, b = table({MLP: 1.0, HEAD: 2.0}, scale=2.0), table({MLP: 3.0, MLP8: 1.0})
    assert [dataclasses.astuple(d)[1:] for d in latency_table.diff(a, b)] == [(2.0, 3.0), (4.0, None), (None, 1.0)]
    assert latency_table.diff(a, b)[0].ratio == 1.5
    assert latency_table.diff(a, b)[1].ratio is None


def test_a_table_survives_storage(tmp_path):
    made = table({MLP: 1.0}, call=ms(0.1), calibration=(residual(1, 1.1),), validation=(residual(1, 1.1),), drift=0.01)
    records.save(made, tmp_path / "t.json")
    assert records.load(tmp_path / "t.json", LatencyTable) == made


def test_a_quantity_is_rescaled_with_its_quantiles():
    got = latency_table.rescaled(ms(4.0, 0.5), 0.25, less=1.0)
    assert (got.value, got.quantile(0.1), got.quantile(0.5)) == (0.75, 0.75, 1.25)
    assert latency_table.rescaled(ms(1.0), 1.0, less=2.0).value == 0.0


@pytest.mark.parametrize("name", ["../escaped", "/tmp/escaped", "a/b", "", ".."])
def test_a_table_is_kept_under_plain_names_only(tmp_path, name):
    for target in (msgspec.structs.replace(TARGET, device=name), msgspec.structs.replace(TARGET, backend=name)):
        with pytest.raises(TableError, match="not a name that a table can be kept under"):
            latency_table.store(table({MLP: 1.0}, target=target), tmp_path / "in")
    assert not list(tmp_path.iterdir())


def test_of_several_tables_of_a_device_elsewhere_the_surest_is_taken_and_none_of_emulated_times(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for error in (0.03, 0.01, 0.02):
        latency_table.store(table({MLP: 1 + error}, relative_error=error), tmp_path)
    emulated = Environment(must_match=(*HERE.must_match, ("emulated", True)))
    latency_table.store(table({MLP: 9.0}, environment=emulated, relative_error=0.0), tmp_path)
    found = latency_table.stored(TARGET, (MLP,), tmp_path)
    assert found.table.relative_error == 0.01

"""Tables for a person and for a data frame: what goes out comes back, and two tables against each other say where they differ."""

from __future__ import annotations

import io
import json
import math
import re
import sys

import msgspec
import pandas
import pytest
from rich.console import Console

from nascompile import latency_table, records, table_view
from nascompile.errors import TableError
from nascompile.records import FLOAT32, INT8, Environment, LatencyTable, Operator, Quantity, TableRow, Target, Workload

TARGET = Target(device="cpu", backend="onnxruntime", workload=Workload(sequence=50), threads=2, session=(("spinning", "1"),))
HERE = Environment(must_match=(("cpu", "A"), ("isa", ["avx2", "vnni"]), ("session.spinning", "1")), recorded=(("load", 0.5),))


def operator(kind, width=8, precision=FLOAT32, **attributes):
    return Operator(kind=kind, dims=(("batch", 1), ("width", width)), attributes=tuple(attributes.items()), precision=precision)


MLPS = [operator("mlp", width, precision) for precision in (FLOAT32, INT8) for width in (8, 16)]
HEAD = Operator(kind="head", dims=(("labels", 3),), attributes=(("activation", "tanh"), ("kernel", 3)))
CONV = Operator(kind="conv", dims=(("batch", 1),), attributes=(("kernel", "3x3"),))


def ms(value, spread=0.02):
    quantiles = ((0.1, value), (0.25, value * 1.01), (0.5, value * (1 + spread)), (0.9, value * 1.2), (0.99, value * 1.5))
    return Quantity(value=value, unit="ms", kind="measured", n=1234, quantiles=quantiles)


def table(timed, **fields):
    made = tuple(TableRow(operator=o, latency=v if isinstance(v, Quantity) else ms(v), noisy=o.kind == "head") for o, v in timed.items())
    return LatencyTable(**({"target": TARGET, "environment": HERE, "rows": made, "call": ms(0.05), "scale": 1.25} | fields))


BARE = Quantity(value=0.5, unit="ms", kind="simulated", n=1)
ONE = table({MLPS[0]: 1.0, MLPS[1]: 2.0, MLPS[2]: 0.5, MLPS[3]: 1.0, HEAD: BARE, CONV: 5.0}, relative_error=0.03, drift=0.01, seconds=12.0)


def printed(things, width=100):
    stream = io.StringIO()
    console = Console(file=stream, width=width)
    for thing in things:
        console.print(thing)
    return stream.getvalue()


# ---------------------------------------------------------------------------------------------- one table


def test_a_person_sees_what_the_table_is_worth():
    text = "\n".join(table_view.headline(ONE))
    for part in ("cpu, onnxruntime, forward-b1-s50, 2 threads", "6 rows, 1 of them noisy, in 12 s; drift 1.0%", "±3.0 %", "= 1.2500 · ("):
        assert part in text
    assert "isa: avx2 vnni" in text
    assert "recorded: load 0.5" in text
    assert "as the merged tables predicted them" not in text
    merged = latency_table.merge(ONE, table({MLPS[0]: 2.0}))
    text = " ".join("\n".join(table_view.headline(merged)).split())
    assert "0 whole networks, as the merged tables predicted them" in text
    assert f"merged {records.digest(ONE)[:8]} " in text


def test_rows_are_grouped_by_kind_with_what_differs_as_columns():
    text = printed(table_view.by_kind(ONE))
    assert max(map(len, text.splitlines())) <= 100
    titles = re.findall(r"^(\w+): (\d) rows?, (\d) noisy; (.*?) *$", text, re.MULTILINE)
    assert [t[:3] for t in titles] == [("conv", "1", "0"), ("mlp", "4", "0"), ("head", "1", "1")], "the costliest kind first"
    assert titles[1][3] == "batch=1"
    (header,) = [line.split() for line in text.splitlines() if line.split()[:1] == ["width"]]
    assert header == ["width", "precision", "ms", "p50", "p90", "n", "share"]
    assert re.search(r"^ *16 +fp32 +2.0000 +2.0400 +2.4000 +1,234 +20.0%", text, re.MULTILINE)
    assert [line for line in text.splitlines() if line.rstrip().endswith("noisy") and "fp32" in line]


def test_words_of_a_file_are_no_markup():
    assert "[bold]x[/bold]" in printed(table_view.by_kind(table({operator("mlp", act="[bold]x[/bold]"): 1.0})))


# ---------------------------------------------------------------------------------------------- rows of data


def read_back(path):
    readers = {".csv": pandas.read_csv, ".parquet": pandas.read_parquet, ".json": pandas.read_json}
    return readers[path.suffix](path)


@pytest.mark.parametrize("suffix", table_view.FORMATS)
def test_what_is_exported_comes_back(tmp_path, suffix):
    rows = table_view.rows_of(ONE)
    table_view.write(rows, tmp_path / f"rows{suffix}")
    frame = read_back(tmp_path / f"rows{suffix}")
    assert list(frame.columns) == list(rows[0])
    assert len(frame) == 6
    for row, (_, got) in zip(rows, frame.iterrows(), strict=True):
        for name, value in row.items():
            if value is None:
                assert pandas.isna(got[name]), name
            elif isinstance(value, float):
                assert math.isclose(got[name], value, rel_tol=1e-12), name
            else:
                assert str(got[name]).removesuffix(".0") == str(value), name


def test_the_columns_hold_the_table():
    first, *_, head, conv = table_view.rows_of(ONE)
    assert (first["kind"], first["precision"], first["weights_bits"]) == ("mlp", "fp32", 32)
    assert (first["dim.width"], first["dim.labels"]) == (8, None)
    assert (first["ms"], first["predicted_ms"], first["p25_ms"], first["p99_ms"]) == (1.0, 1.25, 1.01, 1.5)
    assert (first["n"], first["timing"], first["noisy"], first["share"]) == (1234, "measured", False, 0.1)
    assert first["noise"] == pytest.approx(0.02)
    assert (head["noisy"], head["p50_ms"], head["noise"], head["attribute.activation"]) == (True, None, None, "tanh")
    assert (head["attribute.kernel"], conv["attribute.kernel"]) == (3, "3x3")
    about = {"device": "cpu", "threads": 2, "workload.sequence": 50, "session.spinning": "1", "environment.cpu": "A", "call_ms": 0.05}
    assert about.items() <= first.items()
    assert json.loads(first["environment.isa"]) == ["avx2", "vnni"]
    assert "environment.session.spinning" not in first
    assert sum(row["share"] for row in table_view.rows_of(ONE)) == pytest.approx(1.0)


def test_exports_of_several_tables_stand_below_each_other(tmp_path):
    other = table({MLPS[0]: 3.0}, environment=Environment(must_match=(("cpu", "B"),)))
    frames = []
    for name, made in (("a", ONE), ("b", other)):
        table_view.write(table_view.rows_of(made), tmp_path / f"{name}.parquet")
        frames.append(pandas.read_parquet(tmp_path / f"{name}.parquet"))
    both = pandas.concat(frames)
    assert both[both["dim.width"] == 8].query("kind == 'mlp' and precision == 'fp32'").set_index("environment.cpu")["ms"].to_dict() == {
        "A": 1.0, "B": 3.0,
    }  # fmt: skip


def test_a_format_that_is_not_known_names_those_that_are(tmp_path):
    with pytest.raises(TableError) as caught:
        table_view.write(table_view.rows_of(ONE), tmp_path / "rows.xlsx")
    assert ".csv, .parquet, .json" in caught.value.detail
    assert list(tmp_path.iterdir()) == []


def test_without_pyarrow_the_command_that_installs_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(TableError, match="needs pyarrow") as caught:
        table_view.write(table_view.rows_of(ONE), tmp_path / "rows.parquet")
    assert "pip install pyarrow" in caught.value.hint
    table_view.write(table_view.rows_of(ONE), tmp_path / "rows.csv")


# ---------------------------------------------------------------------------------------------- two tables


@pytest.fixture
def two():
    """`a` and `b`: FP32 1.5 times as slow in b, INT8 half and a third as slow, one operator in each alone; scales differ."""
    a = table({MLPS[0]: 1.0, MLPS[1]: 2.0, MLPS[2]: 2.0, MLPS[3]: 3.0, HEAD: 1.0}, scale=2.0)
    b = table(
        {MLPS[0]: 3.0, MLPS[1]: 6.0, MLPS[2]: 2.0, MLPS[3]: 2.0, CONV: 7.0}, scale=1.0,
        target=msgspec.structs.replace(TARGET, threads=1, session=(("spinning", "0"),)),
        environment=Environment(must_match=(("cpu", "B"), ("isa", ["avx2", "vnni"]), ("session.spinning", "0"))),
    )  # fmt: skip
    return a, b


def test_what_differs_comes_first_then_ratios_then_operators(two):
    found = table_view.compare(*two)
    assert found.target == (("threads", 2, 1), ("session.spinning", "1", "0"))
    assert [name for name, _, _ in found.environment] == ["cpu", "session.spinning"]
    assert found.recorded == (("load", 0.5, None),)
    groups = {(g.kind, g.precision): (g.n, g.median, g.low, g.high) for g in found.groups}
    assert groups == {
        ("all", ""): (4, 1.0, pytest.approx(1 / 3), 1.5), ("mlp", "fp32"): (2, 1.5, 1.5, 1.5),
        ("mlp", "int8"): (2, pytest.approx((1 / 2 + 1 / 3) / 2), pytest.approx(1 / 3), 0.5),
    }  # fmt: skip
    assert (found.groups[0].kind, [row.operator.kind for row in found.rows[-2:]]) == ("all", ["head", "conv"])
    assert [row.ratio for row in found.shared] == [1.5, 1.5, 0.5, pytest.approx(1 / 3)]
    assert [row.operator for row in (*found.only(True), *found.only(False))] == [HEAD, CONV]
    text = printed(table_view.difference_tables(found))
    assert text.index("what differs") < text.index("b / a") < text.index("operators")
    assert re.search(r"must match +cpu +A +B", text)
    assert max(map(len, text.splitlines())) <= 100


def test_equal_tables_differ_in_nothing():
    found = table_view.compare(ONE, ONE)
    assert (found.target, found.environment, found.recorded) == ((), (), ())
    assert {row.ratio for row in found.rows} == {1.0}
    assert "what differs" not in printed(table_view.difference_tables(found))


def test_an_operator_that_took_no_time_has_no_ratio():
    zero, one = table({MLPS[0]: 0.0, MLPS[1]: 1.0}), table({MLPS[0]: 1.0, MLPS[1]: 1.0})
    for a, b in ((zero, one), (one, zero)):
        found = table_view.compare(a, b)
        assert found.groups[0].n == len(found.shared) == 1
        json.dumps(table_view.difference_facts(found, "a", "b"), allow_nan=False)
        printed(table_view.difference_tables(found))


def test_the_comparison_as_data(two):
    found = table_view.compare(*two)
    facts = table_view.difference_facts(found, "a.json", "b.json")
    assert facts["environment"][0] == {"field": "cpu", "a": "A", "b": "B"}
    assert facts["groups"][1]["median"] == 1.5
    frame = pandas.read_csv(io.StringIO(table_view.csv_text(table_view.difference_rows(found))))
    assert list(frame["ratio"][:2]) == [1.5, 1.5]
    assert {"kind", "precision", "dim.width", "a_ms", "b_ms", "ratio"} <= set(frame.columns)
    assert pandas.isna(frame["a_ms"].iloc[-1])


def test_the_page_holds_every_ratio_and_needs_no_network(two, tmp_path):
    from plotly.offline import get_plotlyjs

    table_view.plot(table_view.compare(*two), "<a>.json", "b.json", tmp_path / "d.html")
    page = (tmp_path / "d.html").read_text()
    own = page.replace(get_plotlyjs(), "")
    assert len(own) < len(page)
    assert not re.search(r"(src|href)=[\"']?https?:|@import|url\(https?:", own)
    assert "&lt;a&gt;.json" in own
    (facts,) = re.findall(r'<script type="application/json" id="facts">(.*?)</script>', own, re.DOTALL)
    traces = json.loads(facts)
    assert {trace["name"]: (trace["x"], trace["y"]) for trace in traces} == {
        "mlp, fp32 (2)": ([4.0, 2.0], [1.5, 1.5]), "mlp, int8 (2)": ([4.0, 6.0], [0.5, pytest.approx(1 / 3)]),
    }  # fmt: skip
    assert len({trace["symbol"] for trace in traces}) == 2
    assert "Only in a" in own
    assert CONV.label in own


@pytest.mark.parametrize(("name", "says"), [("d.svg", "kaleido"), ("d.png", "kaleido"), ("d.txt", "no format"), ("d", "no format")])
def test_a_figure_that_cannot_be_drawn_is_refused(two, tmp_path, name, says):
    with pytest.raises(TableError, match=says) as caught:
        table_view.plot(table_view.compare(*two), "a", "b", tmp_path / name)
    assert "d.html" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_tables_without_a_common_operator_have_nothing_to_plot(tmp_path):
    found = table_view.compare(table({HEAD: 1.0}), table({CONV: 1.0}))
    with pytest.raises(TableError, match="no operator in common"):
        table_view.plot(found, "a", "b", tmp_path / "d.html")
    printed(table_view.difference_tables(found))

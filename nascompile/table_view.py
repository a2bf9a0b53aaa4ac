"""Latency tables for a person and for a data frame: a table by kinds of operators, two tables against each other, a file of rows."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from nascompile import latency_table
from nascompile.errors import TableError
from nascompile.latency_table import RowDifference
from nascompile.mcu.board import instructions_of
from nascompile.records import LatencyTable, Operator, TableRow, Target, write_atomic

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

Row = dict[str, Any]
LEVELS = (0.1, 0.25, 0.5, 0.9, 0.99)
FORMATS = (".csv", ".parquet", ".json")
ASSETS = Path(__file__).with_name("report_assets")
COLUMNS = 100
"""What a person's screen shows in one line, and a pipe gets."""
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "x", "star")


# ---------------------------------------------------------------------------------------------- one table, for a person


def headline(table: LatencyTable) -> list[str]:
    """What the table is of, what it is worth, and where it was made; a line each."""
    target, noisy = table.target, sum(row.noisy for row in table.rows)
    threads = "1 thread" if target.threads == 1 else f"{target.threads} threads"
    networks = f"{len(table.validation)} whole networks" + ", each left out in turn" * bool(table.calibration)
    if latency_table.MERGED in dict(table.environment.recorded):
        networks += ", as the merged tables predicted them"
    recorded = ", ".join(f"{name} {_plain(value)}" for name, value in table.environment.recorded)
    lines = [
        f"{target.device}, {target.backend}, {latency_table.workload_label(target.workload)}, {threads}",
        f"{len(table.rows)} rows, {noisy} of them noisy, in {table.seconds:.0f} s; drift {table.drift:.1%}",
        f"90 % interval {latency_table.error_text(table)} by {networks}",
        f"predicted = {table.scale:.4f} · ({table.call.value if table.call else 0:.4f} ms for the call + the rows{_rest(table)})",
        *(f"  {name}: {_plain(value)}" for name, value in table.environment.must_match),
        *([f"  recorded: {recorded}"] if recorded else []),
    ]
    return [part for line in lines for part in textwrap.wrap(line, COLUMNS, subsequent_indent="    ", break_on_hyphens=False)]


def _rest(table: LatencyTable) -> str:
    """What a prediction adds to the rows."""
    if table.correction is None:
        return ""
    times = "".join(f", those of {name} × {factor:.3f}" for name, factor in table.correction.factors if factor != 1)
    blocks = "".join(f" + {ms:.4f} ms for each block of {name}" for name, ms in table.correction.block_ms)
    return f"{times}{blocks} + {table.correction.change_ms:.4f} ms for each change of precision, and by bytes of weights"


def by_kind(table: LatencyTable) -> list[RenderableType]:
    """A table for every kind of operator: columns for what differs among its rows, what does not in the title; slowest rows first."""
    groups: dict[str, list[TableRow]] = {}
    for row in table.rows:
        groups.setdefault(row.operator.kind, []).append(row)
    whole = _sum(table.rows)
    ordered = sorted(groups.items(), key=lambda item: (-_sum(item[1]), item[0]))
    return [_kind_table(kind, rows, whole, modelled_clock(table)) for kind, rows in ordered]


def _kind_table(kind: str, rows: Sequence[TableRow], whole: float, clock: float) -> Table:
    sizes = [_sizes(row.operator) for row in rows]
    names = list(dict.fromkeys(name for size in sizes for name in size))
    varying = [name for name in names if len({size.get(name) for size in sizes}) > 1]
    same = " ".join(f"{name}={sizes[0][name]}" for name in names if name not in varying)
    noisy = sum(row.noisy for row in rows)
    title = f"{kind}: {len(rows)} {'row' if len(rows) == 1 else 'rows'}, {noisy} noisy" + f"; {same}" * bool(same)
    title += "".join(f"; {word}, not measured" for word in sorted({row.latency.kind for row in rows} - {"measured"}))
    found = _table(title)
    for name in varying:
        found.add_column(_escaped(name), justify="right")
    found.add_column("precision")
    counted = ("instructions",) if clock else ()
    for name in (*counted, "ms", *(() if clock else ("p50", "p90", "n")), "share"):
        found.add_column(name, justify="right")
    found.add_column("")
    order = sorted(range(len(rows)), key=lambda i: (-rows[i].latency.value, rows[i].operator.label))
    for i in order:
        row, q = rows[i], rows[i].latency
        levels = dict(q.quantiles)
        found.add_row(
            *(_escaped(str(sizes[i].get(name, ""))) for name in varying), _escaped(row.operator.precision.name),
            *([f"{instructions_of(q.value, clock):,}"] if clock else []), _ms(q.value),
            *([] if clock else [_ms(levels.get(0.5)), _ms(levels.get(0.9)), f"{q.n:,}"]), f"{q.value / whole:.1%}" if whole else "",
            "noisy" if row.noisy else "",
            style="yellow" if row.noisy else "",
        )  # fmt: skip
    return found


def _table(title: str) -> Table:
    from rich import box
    from rich.table import Table

    return Table(title=_escaped(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)


def _escaped(text: str) -> str:
    """Words of a file are no markup."""
    from rich.markup import escape

    return escape(text)


def modelled_clock(table: LatencyTable) -> float:
    """MHz by which milliseconds follow from counted instructions; 0 where they are measured."""
    return float(dict(table.target.session).get("clock_mhz", 0)) if latency_table.time_model(table.environment) else 0.0


def _sum(rows: Iterable[TableRow]) -> float:
    return math.fsum(row.latency.value for row in rows)


def _sizes(operator: Operator) -> dict[str, Any]:
    return {**dict(operator.dims), **dict(operator.attributes)}


def _ms(value: float | None) -> str:
    """Four significant digits below 1 ms are more than the timing has; fixed digits line up."""
    return "" if value is None else f"{value:,.4f}"


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


# ---------------------------------------------------------------------------------------------- one table, as rows of data


def rows_of(table: LatencyTable) -> list[Row]:
    """A flat row per operator with all columns, session settings among the target's: exports can be put one below the other.

    `ms` and the quantiles are as they were timed; `predicted_ms` is what a prediction counts, corrected. `share` is of the sum
    of the rows. `noise` is the median over the tenth percentile, less 1. What an operator or a table does not have is None.
    """
    target, whole = table.target, _sum(table.rows)
    work = {f"workload.{name}": _cell(value) for name, value in msgspec.structs.asdict(target.workload).items()}
    about: Row = {
        "scale": table.scale, "call_ms": table.call.value if table.call else None, "relative_error": table.relative_error,
        "absolute_error_ms": table.absolute_error_ms,
        "drift": table.drift, "device": target.device, "backend": target.backend, "threads": target.threads, **work,
        **{f"session.{name}": value for name, value in target.session},
        **{f"environment.{name}": _cell(value) for name, value in table.environment.must_match if not name.startswith("session.")},
        **{f"recorded.{name}": _cell(value) for name, value in table.environment.recorded},
    }  # fmt: skip
    clock = modelled_clock(table)
    names = operator_columns(row.operator for row in table.rows)
    found = []
    for row in table.rows:
        q, levels = row.latency, dict(row.latency.quantiles)
        noise = latency_table.noise(q)
        found.append(
            {
                **operator_cells(row.operator, names), "ms": q.value, "predicted_ms": latency_table.counted(table, row),
                "instructions": instructions_of(q.value, clock) if clock else None,
                **{f"p{100 * level:g}_ms": levels.get(level) for level in LEVELS}, "n": q.n, "timing": q.kind, "noisy": row.noisy,
                "noise": noise if math.isfinite(noise) else None, "share": q.value / whole if whole else None, **about,
            }
        )  # fmt: skip
    return found


def operator_columns(operators: Iterable[Operator]) -> list[str]:
    """Columns of all dimensions and attributes that any of the operators has, in order of appearance."""
    pairs = [(operator.dims, operator.attributes) for operator in operators]
    dims = dict.fromkeys(f"dim.{name}" for found, _ in pairs for name, _ in found)
    return [*dims, *dict.fromkeys(f"attribute.{name}" for _, found in pairs for name, _ in found)]


def operator_cells(operator: Operator, names: Sequence[str]) -> Row:
    """What an operator is, one value a column."""
    own = {f"dim.{name}": value for name, value in operator.dims} | {f"attribute.{name}": value for name, value in operator.attributes}
    p = operator.precision
    formats = {"weights": p.weights, "activations": p.activations}
    bits = {f"{name}_bits": f.bits for name, f in formats.items()} | {f"{name}_kind": f.kind for name, f in formats.items()}
    return {"kind": operator.kind, "precision": p.name, **bits, **{name: own.get(name) for name in names}}


def _cell(value: Any) -> Any:
    """A value that every format can hold."""
    return value if value is None or isinstance(value, str | int | float) else json.dumps(msgspec.to_builtins(value))


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """CSV with a header; what is None is an empty cell."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def write(rows: Sequence[Row], path: Path) -> None:
    """The rows as CSV, Parquet or JSON, by the suffix; the file is written whole or not at all."""
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise TableError(f"no format for this name: {path}", detail=f"known suffixes: {', '.join(FORMATS)}", hint="--out rows.csv")
    if suffix == ".parquet":
        content = _parquet(rows)
    elif suffix == ".csv":
        content = csv_text(rows).encode()
    else:
        content = (json.dumps(rows, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
    write_atomic(path, content)


def _parquet(rows: Sequence[Row]) -> bytes:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise TableError("a Parquet file needs pyarrow, which is not installed", hint="pip install pyarrow; or --out rows.csv") from error
    stream = io.BytesIO()
    columns = {name: _column([row[name] for row in rows]) for name in (rows[0] if rows else ())}
    parquet.write_table(pyarrow.table(columns), stream)
    return stream.getvalue()


def _column(values: list[Any]) -> list[Any]:
    """Values of one type: an attribute may be a number of one operator and a word of another."""
    words = any(isinstance(value, str) for value in values)
    return [None if value is None else str(value) for value in values] if words else values


# ---------------------------------------------------------------------------------------------- two tables


@dataclass(frozen=True)
class Group:
    """Ratios b / a of the operators of one kind and precision."""

    kind: str
    precision: str
    n: int
    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Two tables against each other."""

    target: tuple[tuple[str, Any, Any], ...]
    """(field, a's value, b's value) of the targets where they differ."""
    environment: tuple[tuple[str, Any, Any], ...]
    """Of what must match for numbers to be comparable."""
    recorded: tuple[tuple[str, Any, Any], ...]
    """Of what is only recorded."""
    groups: tuple[Group, ...]
    """All operators of both tables together, then by kind and precision, the largest groups first."""
    rows: tuple[RowDifference, ...]
    """Operators of both tables by falling ratio, then those of `a` only, then those of `b` only."""

    @property
    def shared(self) -> tuple[RowDifference, ...]:
        """Operators of both tables that took time in both."""
        return tuple(row for row in self.rows if row.a and row.b)

    def only(self, a: bool) -> tuple[RowDifference, ...]:
        """Operators of one of the tables only."""
        return tuple(row for row in self.rows if (row.b if a else row.a) is None)


def compare(a: LatencyTable, b: LatencyTable) -> Comparison:
    """Every operator of either table, scales included, and what else differs between the two."""
    rows = [RowDifference(d.operator, d.a, d.b) for d in latency_table.diff(a, b)]
    ordered = sorted(rows, key=_by_ratio)
    parts: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row.a and row.b:
            for key in (("all", ""), (row.operator.kind, row.operator.precision.name)):
                parts.setdefault(key, []).append(row.b / row.a)
    groups = [Group(*key, len(found), statistics.median(found), min(found), max(found)) for key, found in parts.items()]
    return Comparison(
        target=_different(_target_fields(a.target), _target_fields(b.target)),
        environment=latency_table.differences(a.environment, b.environment),
        recorded=_different(dict(a.environment.recorded), dict(b.environment.recorded)),
        groups=tuple(sorted(groups, key=lambda g: (g.kind != "all", -g.n, g.kind, g.precision))), rows=tuple(ordered),
    )  # fmt: skip


def _by_ratio(row: RowDifference) -> tuple[int, float, str]:
    if row.a is None or row.b is None:
        return 1 + (row.a is None), -(row.a or row.b or 0.0), row.operator.label
    return 0, -row.b / row.a if row.a else -math.inf, row.operator.label


def _target_fields(target: Target) -> dict[str, Any]:
    body = msgspec.structs.asdict(target)
    session, workload = dict(body.pop("session")), msgspec.structs.asdict(body.pop("workload"))
    return body | {f"workload.{k}": v for k, v in workload.items()} | {f"session.{k}": v for k, v in session.items()}


def _different(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[tuple[str, Any, Any], ...]:
    return tuple((name, a.get(name), b.get(name)) for name in {**a, **b} if a.get(name) != b.get(name))


def difference_tables(found: Comparison) -> list[RenderableType]:
    """What differs, the ratios by kind and precision, then every operator."""
    made: list[RenderableType] = []
    fields = [("target", found.target), ("must match", found.environment), ("recorded", found.recorded)]
    if any(part for _, part in fields):
        about = _table("what differs")
        for name in ("", "field", "a", "b"):
            about.add_column(name, overflow="fold")
        for part, differences in fields:
            for name, x, y in differences:
                about.add_row(part, *map(_escaped, (name, _plain(x), _plain(y))), style="dim" if part == "recorded" else "")
        made.append(about)
    if found.groups:
        summary = _table("b / a")
        for name in ("kind", "precision"):
            summary.add_column(name)
        for name in ("operators", "median", "least", "most"):
            summary.add_column(name, justify="right")
        for g in found.groups:
            numbers = (str(g.n), _ratio(g.median), _ratio(g.low), _ratio(g.high))
            summary.add_row(_escaped(g.kind), _escaped(g.precision), *numbers, style="bold" * (g.kind == "all"))
        made.append(summary)
    rows = _table("operators")
    for name in ("a ms", "b ms", "b / a"):
        rows.add_column(name, justify="right", no_wrap=True)
    rows.add_column("operator", overflow="fold")
    for row in found.rows:
        rows.add_row(_ms(row.a), _ms(row.b), _ratio(row.ratio if row.a else None), _escaped(row.operator.label))
    return [*made, rows]


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def difference_rows(found: Comparison) -> list[Row]:
    """A flat row per operator of either table."""
    names = operator_columns(row.operator for row in found.rows)
    return [
        operator_cells(row.operator, names) | {"a_ms": row.a, "b_ms": row.b, "ratio": row.ratio if row.a else None} for row in found.rows
    ]


def difference_facts(found: Comparison, title_a: str, title_b: str) -> Row:
    """The comparison as plain data."""
    fields = {
        name: [{"field": field, "a": x, "b": y} for field, x, y in getattr(found, name)] for name in ("target", "environment", "recorded")
    }
    rows = [
        {"operator": msgspec.to_builtins(d.operator), "a_ms": d.a, "b_ms": d.b, "ratio": d.ratio if d.a else None} for d in found.rows
    ]
    return {"a": title_a, "b": title_b, **fields, "groups": [msgspec.to_builtins(g) for g in found.groups], "rows": rows}


def plot(found: Comparison, title_a: str, title_b: str, path: Path) -> None:
    """One page with the ratio of every shared operator over its latency, and the rest in tables; needs no network to be read."""
    suffix = path.suffix.lower()
    if suffix in (".svg", ".png", ".pdf", ".jpg", ".jpeg", ".webp"):
        raise TableError(
            f"no {suffix} can be drawn: plotly makes images only with kaleido and Chrome, which nothing else here needs",
            hint=f"--plot {path.with_suffix('.html')}: a page that every browser shows; its menu saves an image",
        )
    if suffix not in (".html", ".htm"):
        raise TableError(f"no format of a figure for this name: {path}", hint=f"--plot {path.with_suffix('.html')}")
    if not found.shared:
        raise TableError("the two tables have no operator in common: nothing to plot", hint="`nascompile table show` says what each is of")
    import jinja2
    from plotly.offline import get_plotlyjs

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("table_diff.html").render(
        c=found, a=title_a, b=title_b, plotly=get_plotlyjs(), style=(ASSETS / "style.css").read_text("utf-8"),
        traces=_traces(found), ms=_ms, ratio=_ratio, plain=_plain,
    )  # fmt: skip
    write_atomic(path, (page.rstrip() + "\n").encode())


def _traces(found: Comparison) -> list[Row]:
    """Points of the chart: a trace per kind and precision, coloured by the kind, shaped by the precision."""
    kinds = sorted({row.operator.kind for row in found.shared})
    precisions = sorted({row.operator.precision.name for row in found.shared})
    made = []
    for group in found.groups:
        rows = [row for row in found.shared if (row.operator.kind, row.operator.precision.name) == (group.kind, group.precision)]
        if rows:
            made.append(
                {
                    "name": f"{group.kind}, {group.precision} ({group.n})", "x": [row.a for row in rows], "y": [row.ratio for row in rows],
                    "text": [row.operator.label for row in rows], "b": [row.b for row in rows], "colour": kinds.index(group.kind),
                    "symbol": SYMBOLS[precisions.index(group.precision) % len(SYMBOLS)],
                }
            )  # fmt: skip
    return made

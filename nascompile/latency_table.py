"""A table of timed operators: predicts networks with an interval, says what it lacks, refuses to speak for another machine."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from nascompile import places, records
from nascompile.errors import RecordError, TableError
from nascompile.records import (
    Environment,
    Interval,
    LatencyTable,
    Operator,
    OperatorGraph,
    Quantity,
    Residual,
    TableCorrection,
    TableRow,
    Target,
    Workload,
)  # fmt: skip

LEVEL = 0.9
FLOOR = 0.01
"""No interval is narrower than ± this fraction: the same engine timed twice differs by that much."""
PACE, PACE_ERROR = "pace", 0.03
"""In what is recorded of a table that a run uses: by what its times were multiplied, since the machine was slower or faster when the run
began; and the half width of the 90 % interval, as a fraction, of what a few operators say of that, less than which is no other pace.
(Networks that were brought to a table's pace by others differ by 0.9 to 2.8 % on average from what they were: `known` in
docs/benchmarks.md.)"""
_STEPS, _LEAST_TO_SPLIT = 40, 8
"""Of the grid on which an interval's two parts are looked for, and the fewest networks that tell them apart."""
MERGED = "merged"
"""In what is recorded of a merged table: the ends of its parts' file names. Its validation networks are predicted by these parts."""
FOREIGN = "a latency table of another environment"
"""How a result says whose predictions it rests on."""
_T95 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812)
"""95 % points of Student's t for 1 to 10 degrees of freedom."""


@dataclass(frozen=True)
class Found:
    """A stored table for a target and environment, and which of the wanted operators it lacks."""

    path: Path
    table: LatencyTable
    missing: tuple[Operator, ...]


@dataclass(frozen=True)
class RowDifference:
    """One operator in two tables, in ms; None where a table has no such row."""

    operator: Operator
    a: float | None
    b: float | None

    @property
    def ratio(self) -> float | None:
        """b / a."""
        return None if self.a is None or self.b is None else self.b / self.a


# ---------------------------------------------------------------------------------------------- prediction


def predict(table: LatencyTable, graph: OperatorGraph) -> Interval:
    """Latency in ms with a 90 % interval; TableError naming the operators that have no row."""
    known = {row.operator: row for row in table.rows}
    if lacking := missing(table, (node.operator for node in graph.nodes)):
        raise TableError(
            f"the latency table of {table.target.id} lacks {len(lacking)} of the network's operators",
            detail="\n".join(operator.label for operator in lacking),
            hint=f"`nascompile profile --device {table.target.device} --backend {table.target.backend}` with the same model adds them",
        )
    value = total(table, known, graph)
    half = half_width(table, value)
    return Interval(value=value, low=max(0.0, value - half), high=value + half, unit="ms", level=LEVEL)


def is_another_pace(ratio: float) -> bool:
    """Whether operators that take `ratio` times what a table says show more than how well a few of them can be timed."""
    return abs(ratio - 1) > PACE_ERROR


def at_pace(table: LatencyTable, ratio: float) -> LatencyTable:
    """The table of a machine that takes `ratio` times as long as when it was timed; its interval is wider by what that may be off.

    The table itself where that is no other pace.
    """
    if not is_another_pace(ratio):
        return table
    recorded = (*(pair for pair in table.environment.recorded if pair[0] != PACE), (PACE, round(ratio, 4)))
    return msgspec.structs.replace(
        table, environment=Environment(must_match=table.environment.must_match, recorded=recorded), scale=table.scale * ratio,
        relative_error=math.hypot(table.relative_error, PACE_ERROR),
    )  # fmt: skip


def half_width(table: LatencyTable, value: float) -> float:
    """Of the 90 % interval around a prediction, both in ms."""
    return math.hypot(table.relative_error * value, table.absolute_error_ms)


def typical_error(table: LatencyTable) -> float:
    """Half width of the interval of a network in the middle of those that gave it, as a fraction."""
    middle = statistics.median(r.predicted_ms for r in table.validation) if table.validation else math.inf
    return half_width(table, middle) / middle if middle < math.inf else table.relative_error


def error_text(table: LatencyTable) -> str:
    """The interval in words, for example `±2.1 %` or `±1.0 % and ±0.016 ms`."""
    shown = f"±{100 * table.relative_error:.1f} %"
    return f"{shown} and ±{table.absolute_error_ms:.2g} ms" if table.absolute_error_ms else shown


def total(table: LatencyTable, known: Mapping[Operator, TableRow], graph: OperatorGraph) -> float:
    """The predicted milliseconds alone; `known` are the table's rows by operator, and lack none of the graph's."""
    call, size = table.call.value if table.call else 0.0, footprint(known, graph)
    rows = sum(counted(table, known[node.operator], size) for node in graph.nodes)
    return table.scale * call + rows + between(table, known, graph)


def counted(table: LatencyTable, row: TableRow, size: int = 0) -> float:
    """Milliseconds that a prediction counts for a row in a network of so many bytes of weights; 0: as many as its stack has."""
    factors = dict(table.correction.factors) if table.correction and row.footprint else {}
    more = at(row.reach, size) if size else 0.0
    return table.scale * factors.get(group(row.operator), 1.0) * (row.latency.value + more)


def group(operator: Operator) -> str:
    """What operators have in common that a correction treats alike, for example `mlp int8` and `mlp int8, one token`."""
    part = dict(operator.attributes).get("out") or ("one token" if dict(operator.dims).get("sequence") == 1 else "")
    return f"{operator.kind} {operator.precision.name}" + f", {part}" * bool(part)


def between(table: LatencyTable, known: Mapping[Operator, TableRow], graph: OperatorGraph) -> float:
    """Milliseconds of a network that belong to no row: blocks, changes of precision, and weights that the caches do not hold.

    `known` are the table's rows by operator.
    """
    if table.correction is None:
        return 0.0
    spent, line, each = table.correction.change_ms * changes(graph), table.correction.reach, dict(table.correction.block_ms)
    here = at(line, footprint(known, graph))
    for node in graph.nodes:
        if there := known[node.operator].footprint:
            spent += each.get(node.operator.precision.name, 0.0) + node.size_bytes * (here - at(line, there))
    return table.scale * spent


def footprint(known: Mapping[Operator, TableRow], graph: OperatorGraph) -> int:
    """Bytes of weights that a call reads in layers; what a network has once, such as a table of words, may be read in part only.

    What has no row is not counted.
    """
    return sum(node.size_bytes for node in graph.nodes if (row := known.get(node.operator)) and row.footprint)


def changes(graph: OperatorGraph) -> int:
    """Blocks that follow one of another precision."""
    names = [node.operator.precision.name for node in graph.nodes]
    return sum(a != b for a, b in itertools.pairwise(names))


def at(points: Sequence[tuple[float, float]], size: int) -> float:
    """The line through (log2 of bytes, value) at so many bytes."""
    place = math.log2(max(1, size))
    for (left, low), (right, high) in itertools.pairwise(points):
        if place <= right:
            return low + (high - low) * max(0.0, place - left) / (right - left)
    return points[-1][1] if points else 0.0


def missing(table: LatencyTable | None, operators: Iterable[Operator]) -> tuple[Operator, ...]:
    """Operators without a row, each once, in the order given."""
    known = {row.operator for row in table.rows} if table else set()
    return tuple(operator for operator in dict.fromkeys(operators) if operator not in known)


def interval_half_width(residuals: Sequence[Residual]) -> tuple[float, float]:
    """Half widths of the 90 % prediction interval: that of long calls, as a fraction, and that of very short ones, in ms.

    Errors are taken as normal about zero with variance (a · predicted)² + b², the likeliest a and b on a grid; a alone for few networks.
    Student's t, with as many degrees of freedom as there are networks, widens both for a small number of them. Infinite without networks.
    """
    if not residuals:
        return float("inf"), 0.0
    import numpy as np  # what starts without it, such as the command line's help, stays fast

    errors = [r.measured.value / r.predicted_ms - 1 for r in residuals]
    spread, factor = math.sqrt(sum(e * e for e in errors) / len(errors)), _t95(len(errors))
    if len(residuals) < _LEAST_TO_SPLIT or factor * spread <= FLOOR:
        return max(FLOOR, factor * spread), 0.0
    predicted = np.array([r.predicted_ms for r in residuals])
    missed = np.array([r.measured.value for r in residuals]) - predicted
    steps = np.linspace(0.0, 1.0, _STEPS + 1) ** 2
    a, b = (found.ravel()[1:] for found in np.meshgrid(spread * steps, np.abs(missed).max() * steps, indexing="ij"))
    variances = (a[:, None] * predicted) ** 2 + b[:, None] ** 2
    best = int(np.argmin((np.log(variances) + missed**2 / variances).sum(axis=1)))  # twice the negative logarithm of the likelihood
    return max(FLOOR, factor * float(a[best])), factor * float(b[best])


# ---------------------------------------------------------------------------------------------- whose table it is


def lowering_digest() -> str:
    """Hash of our own code that decides what the backend is given: lowering, passes, quantization."""
    package = Path(__file__).resolve().parent
    files = [package / "lowering.py", *sorted((package / "passes").glob("*.py")), *sorted((package / "quantization").glob("*.py"))]
    sha = hashlib.sha256()
    for path in files:
        if path.exists():
            sha.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return sha.hexdigest()[:16]


def time_model(environment: Environment) -> str:
    """By what model milliseconds follow from counts; empty where they are measured."""
    return str(dict(environment.must_match).get("modelled", ""))


def differences(a: Environment, b: Environment) -> tuple[tuple[str, Any, Any], ...]:
    """(field, value in a, value in b) for every field that must match and does not; an absent field is None."""
    left, right = dict(a.must_match), dict(b.must_match)
    return tuple((name, left.get(name), right.get(name)) for name in {**left, **right} if left.get(name) != right.get(name))


def difference_lines(found: tuple[tuple[str, Any, Any], ...]) -> list[str]:
    """A line per field that is not what it was where the table was made."""
    return [f"{name}: table has {there}, here it is {here}" for name, there, here in found]


def check_environment(table: LatencyTable, environment: Environment, allow_foreign: bool = False) -> None:
    """TableError listing every field that must match and does not, unless foreign tables are allowed."""
    differ = differences(table.environment, environment)
    if differ and not allow_foreign:
        raise TableError(
            f"the latency table was made elsewhere: it belongs to {table.target.device} with other "
            + ", ".join(name for name, _, _ in differ),
            detail="\n".join(difference_lines(differ)),
            hint=f"`nascompile profile --device {table.target.device} --backend {table.target.backend}` makes one for this environment",
        )


# ---------------------------------------------------------------------------------------------- where tables live


def path_for(folder: Path, table: LatencyTable) -> Path:
    """`<folder>/<device>/<backend>-<workload>-t<threads>-<digest>.json`; the digest is of the whole table, so none is overwritten.

    TableError for names that could lead out of the folder: a table may come from anywhere.
    """
    target = table.target
    for word in (target.device, target.backend):
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", word):
            raise TableError(f"not a name that a table can be kept under: {word!r}", hint="letters, digits, - and _")
    name = f"{target.backend}-{workload_label(target.workload)}-t{target.threads}-{records.digest(table)[:8]}.json"
    return folder / target.device / name


def workload_label(workload: Workload) -> str:
    """Short and fit for a file name: `forward-b1-s50-28x28`."""
    parts = [workload.phase, f"b{workload.batch}"]
    parts += [f"{letter}{n}" for letter, n in (("s", workload.sequence), ("c", workload.context), ("g", workload.generated)) if n]
    if any(workload.resolution):
        parts.append("x".join(map(str, workload.resolution)))
    return "-".join(parts if workload.scenario == "single-stream" else [*parts, workload.scenario])


def find(
    target: Target, environment: Environment, operators: Sequence[Operator], explicit: Path | None = None, allow_foreign: bool = False
) -> Found | None:  # fmt: skip
    """The stored table of this target and environment that lacks fewest operators; ties: best folder, then the newest file.

    `explicit` may be a folder, looked at before the others, or one table file: then only that is considered, and TableError
    says why it cannot be used; `allow_foreign` lets it be of another environment. Damaged files, tables of other machines and those that
    have none of the operators are passed over in folders.
    """
    if explicit is not None and explicit.is_file():
        table = read(explicit)
        if table.target != target:
            raise TableError(
                f"{explicit} was made for another target: {table.target.id}", detail=_target_differences(table.target, target),
                hint="ask for that target, or leave the file out and let `nascompile profile` make a table",
            )  # fmt: skip
        check_environment(table, environment, allow_foreign)
        return Found(explicit, table, missing(table, operators))
    found: list[tuple[tuple[int, int, int, str], Found]] = []
    for rank, folder in enumerate(places.folders(places.TABLES, explicit)):
        for path in sorted((folder / target.device).glob(f"{target.backend}-*.json")):
            try:
                table = records.load(path, LatencyTable)
            except RecordError:
                continue
            if table.target == target and not differences(table.environment, environment):
                lacking = missing(table, operators)
                if len(lacking) < len(set(operators)):
                    found.append(((len(lacking), rank, -path.stat().st_mtime_ns, path.name), Found(path, table, lacking)))
    return min(found, key=lambda item: item[0])[1] if found else None


def nothing_to_add_to(target: Target, environment: Environment, explicit: Path | None = None) -> TableError:
    """What to raise where there is no table that rows could be added to: it says of every one of the device why not."""
    lines = []
    for path, table in of_device(target, explicit):
        differ = [name for name, _, _ in differences(table.environment, environment)]
        if table.target != target:
            lines.append(f"{path}: {unfit(table.target, target)}")
        else:
            lines.append(f"{path}: " + (f"made with other {', '.join(differ)}" if differ else "has none of the model's operators"))
    return TableError(
        f"there is no latency table of this environment to add operators to: {target.device}, {target.backend}, "
        f"{workload_label(target.workload)}, {'1 thread' if target.threads == 1 else f'{target.threads} threads'}",
        detail="\n".join(lines), hint="leave --add-missing out, and a new table is made",
    )  # fmt: skip


def unfit(there: Target, wanted: Target) -> str:
    """Why a table of one target is none of another."""
    if there == wanted:
        return "its graphs were made by other sources of nascompile"
    return "made for another " + ", ".join(n for n in there.__struct_fields__ if getattr(there, n) != getattr(wanted, n))


def of_device(target: Target, explicit: Path | None = None) -> tuple[tuple[Path, LatencyTable], ...]:
    """Every stored table of a target's device, backend and threads, of whatever workload and machine, best folder first."""
    found = []
    for folder in places.folders(places.TABLES, explicit if explicit is None or not explicit.is_file() else explicit.parent):
        for path in sorted((folder / target.device).glob(f"{target.backend}-*.json")):
            try:
                table = records.load(path, LatencyTable)
            except RecordError:
                continue
            if (table.target.backend, table.target.threads) == (target.backend, target.threads):
                found.append((path, table))
    return tuple(found)


def machines(tables: Iterable[LatencyTable]) -> tuple[str, ...]:
    """Names of the processors that tables were taken on, each once."""
    return tuple(dict.fromkeys(machine(table.environment) for table in tables))


def machine(environment: Environment) -> str:
    """Name of the processor that numbers were taken on."""
    fields = dict(environment.must_match)
    return str(fields.get("cpu") or fields.get("gpu") or "")


def stored(target: Target, operators: Sequence[Operator], explicit: Path | None = None) -> Found | None:
    """The table of a target that is not here, taken wherever it is: that which lacks fewest operators, then with the smallest error.

    Only tables whose graphs were made by the code there is now (operators are what it makes of them), and none of emulated times.
    """
    found = []
    for rank, (path, table) in enumerate(of_device(target, explicit)):
        fields = dict(table.environment.must_match)
        if table.target == target and fields.get("lowering", lowering_digest()) == lowering_digest() and not fields.get("emulated"):
            lacking = missing(table, operators)
            found.append(((len(lacking), typical_error(table), rank), Found(path, table, lacking)))
    return min(found, key=lambda item: item[0])[1] if found else None


def read(path: Path) -> LatencyTable:
    """The table in a file that a person names; TableError if there is none, and never the advice to remove it."""
    try:
        return records.load(path, LatencyTable)
    except (RecordError, OSError) as error:
        said = f"{error.message}\n{error.detail}".strip() if isinstance(error, RecordError) else str(error)
        hint = "`nascompile table show` lists the tables there are"
        raise TableError(f"not a latency table of this version: {path}", detail=said, hint=hint) from error


def store(table: LatencyTable, explicit: Path | None = None) -> Path:
    """Save a new table in the first writable folder; its path."""
    path = path_for(places.writable(places.TABLES, explicit), table)
    records.save(table, path)
    return path


# ---------------------------------------------------------------------------------------------- two tables


def merge(a: LatencyTable, b: LatencyTable) -> LatencyTable:
    """A new table with the rows of both, the quieter one where both have it; TableError unless target and environment agree.

    Each table's scale and factors are multiplied into its rows, so the new scale is 1; the interval is the wider of the two, and what
    belongs to no row is as the table with the narrower one has it. Validation networks keep what their own table predicted: a table holds
    no operator graphs to predict them by once more. MERGED names the two.
    """
    if a.target != b.target:
        message = f"tables of two targets cannot be merged: {a.target.id} and {b.target.id}"
        raise TableError(message, detail=_target_differences(a.target, b.target), hint="`nascompile table diff` compares them")
    if differ := differences(a.environment, b.environment):
        raise TableError(
            "tables of two environments cannot be merged: they have other " + ", ".join(name for name, _, _ in differ),
            detail="\n".join(f"{name}: {x} and {y}" for name, x, y in differ), hint="`nascompile table diff` compares them",
        )  # fmt: skip
    rows: dict[Operator, TableRow] = {}
    for table in (a, b):
        for row in table.rows:
            times = counted(table, row) / row.latency.value if row.latency.value else 1.0
            reach = tuple((place, ms * times) for place, ms in row.reach)
            scaled = msgspec.structs.replace(row, latency=rescaled(row.latency, times), reach=reach)
            held = rows.get(row.operator)
            if held is None or noise(scaled.latency) < noise(held.latency):
                rows[row.operator] = scaled
    recorded = (*(pair for pair in a.environment.recorded if pair[0] != MERGED), (MERGED, " ".join(records.digest(t)[:8] for t in (a, b))))
    calls = [rescaled(table.call, table.scale) for table in (a, b) if table.call]
    best = min((a, b), key=typical_error)
    rest = best.correction
    if rest:
        line = tuple((place, best.scale * ms) for place, ms in rest.reach)
        each = tuple((name, best.scale * ms) for name, ms in rest.block_ms)
        rest = TableCorrection(change_ms=best.scale * rest.change_ms, block_ms=each, reach=line)
    return LatencyTable(
        target=a.target, environment=Environment(must_match=a.environment.must_match, recorded=recorded), rows=tuple(rows.values()),
        call=min(calls, key=noise, default=None), correction=rest,
        validation=(*a.validation, *b.validation), relative_error=max(a.relative_error, b.relative_error),
        absolute_error_ms=max(a.absolute_error_ms, b.absolute_error_ms),
        drift=max(a.drift, b.drift), seconds=a.seconds + b.seconds,
    )  # fmt: skip


def diff(a: LatencyTable, b: LatencyTable) -> tuple[RowDifference, ...]:
    """Every operator of either table, those of `a` first, scales included."""
    left, right = ({row.operator: counted(t, row) for row in t.rows} for t in (a, b))
    return tuple(RowDifference(operator, left.get(operator), right.get(operator)) for operator in {**left, **right})


def noise(latency: Quantity) -> float:
    """How far the median lies above the tenth percentile, as a fraction: what other users of the machine added."""
    try:
        low, middle = latency.quantile(0.1), latency.quantile(0.5)
    except KeyError:
        return float("inf")
    return middle / low - 1 if low > 0 else float("inf")


def rescaled(latency: Quantity, factor: float, less: float = 0.0) -> Quantity:
    """(latency − less) · factor, never below 0, quantiles alike."""
    def change(value: float) -> float:
        return max(0.0, value - less) * factor

    return Quantity(
        value=change(latency.value), unit=latency.unit, kind=latency.kind, n=latency.n,
        quantiles=tuple((level, change(value)) for level, value in latency.quantiles),
    )  # fmt: skip


def _target_differences(a: Target, b: Target) -> str:
    names = [name for name in a.__struct_fields__ if getattr(a, name) != getattr(b, name)]
    return "\n".join(f"{name}: {getattr(a, name)} and {getattr(b, name)}" for name in names)


def _t95(freedom: int) -> float:
    """95 % point of Student's t: from the table, or by the Cornish–Fisher expansion of the normal one (Abramowitz & Stegun 26.7.5)."""
    if freedom <= len(_T95):
        return _T95[freedom - 1]
    z = 1.6448536
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)

#!/usr/bin/env python3
"""Times the latency tables that come with the package: this machine's processor, the models that users meet first, each backend that runs
here, one and two threads. Minutes each, on an idle machine.

    python tools/ship_tables.py                    # what is not there, or was timed with another runtime or lowering
    python tools/ship_tables.py --only 'demo-*'    # of those whose names fit; may be given again
    python tools/ship_tables.py --list             # names, and which of them are there; nothing is timed
    python tools/ship_tables.py --check            # exit status 1 if a table in the package is not sound, or of another lowering

Stopped, it goes on where it was. The files, in nascompile/latency_tables, are as others are, but for spaces and fields that have their
defaults, which are left out, and for the rows, which have four significant digits.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
from transformers import BertConfig, ViTConfig

import nascompile
from nascompile import latency_table, models, network, plugins, profiler, progress, records, table_check, targets
from nascompile.errors import NascompileError
from nascompile.records import Environment, LatencyTable, Quantity, Target

PACKAGE = Path(nascompile.__file__).parent
TABLES = PACKAGE / "latency_tables"
_SMALL = {"hidden_size": 384, "intermediate_size": 1536}
MODELS = {
    "demo": (lambda: models.read_config(PACKAGE / "demo" / "model"), 0),
    "minilm": (lambda: BertConfig(**_SMALL, num_hidden_layers=6, num_attention_heads=12), 128),
    "vit-small": (lambda: ViTConfig(**_SMALL, num_attention_heads=6), 0),
    "bert-base": (BertConfig, 128),
    "vit-base": (ViTConfig, 0),
}
"""Configuration of two labels (a model's own head is one operator, which its first profile adds) and tokens; images have their own."""
THREADS = (1, 2)
DIGITS = 4
"""Significant digits of the rows: a timing has no more."""


@dataclass(frozen=True)
class Case:
    """One table: a model on a backend with some threads."""

    model: str
    backend_name: str
    threads: int

    @property
    def name(self) -> str:
        return f"{self.model}-{self.backend_name}-t{self.threads}"

    @cached_property
    def config(self) -> Any:
        return MODELS[self.model][0]()

    @cached_property
    def family(self) -> Any:
        return models.family_of(self.config.model_type)

    @cached_property
    def backend(self) -> Any:
        return plugins.get("backends", self.backend_name)

    @cached_property
    def device(self) -> Any:
        return targets.device(targets.LOCAL)

    @cached_property
    def target(self) -> Target:
        workload = self.family.workload(self.config, 1, MODELS[self.model][1])
        return targets.make(targets.LOCAL, self.backend_name, workload, self.threads)

    @cached_property
    def environment(self) -> Environment:
        found: Environment = self.device.environment(self.target, self.backend.versions())
        return found

    @cached_property
    def space(self) -> Any:
        return network.search_space(self.family, self.config, self.backend, self.target, "")

    def stored(self) -> Path | None:
        """The table in the package that a profile here would find complete."""
        wanted = network.operators(self.family, self.config, self.space, self.target)
        for path, table in shipped():
            same = table.target == self.target and not latency_table.differences(table.environment, self.environment)
            if same and not latency_table.missing(table, wanted):
                return path
        return None

    def outdated(self) -> list[Path]:
        """Tables in the package that one made now takes the place of: of this model and processor, with other versions."""
        wanted, here = network.operators(self.family, self.config, self.space, self.target), latency_table.machine(self.environment)
        return [
            path for path, table in shipped()
            if table.target == self.target and latency_table.machine(table.environment) == here
            and set(wanted) & {row.operator for row in table.rows}
        ]  # fmt: skip

    def time(self, work: Path, seconds: float, said: progress.Progress) -> LatencyTable:
        arguments = (self.family, self.config, self.space, self.target, self.backend, self.device, work / self.name, 0)
        return profiler.profile(*arguments, said, seconds=seconds)


def main() -> int:
    """Exit status: 0; 1 for a table that could not be made, or that `--check` finds unfit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="PATTERN", help="names to time, as 'demo-*' or '*-openvino-t2'")
    parser.add_argument("--list", action="store_true", help="print the names and what there is")
    parser.add_argument("--check", action="store_true", help="check the tables in the package")
    parser.add_argument("--seconds", type=float, default=0.0, help="timing of one table in all; 0: 0.4 an operator, .75 a network")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "nascompile-ship-tables", help="what is timed so far")
    given = parser.parse_args()
    if given.check:
        return check()
    chosen = [case for case in cases() if not given.only or any(fnmatch(case.name, pattern) for pattern in given.only)]
    if not chosen:
        parser.error(f"no such table: {', '.join(given.only)}; --list prints the names")
    failed = 0
    for number, case in enumerate(chosen, 1):
        path = case.stored()
        if given.list or path:
            print(f"{case.name}: {path.relative_to(PACKAGE.parent) if path else 'not there'}", flush=True)
            continue
        print(f"{case.name}: timing, {number} of {len(chosen)}", flush=True)
        try:
            table = case.time(given.work, given.seconds, progress.Lines())
            path = ship(table, case.outdated())
        except NascompileError as error:
            print(f"error: {case.name}: {error}", file=sys.stderr)
            failed += 1
            continue
        print(describe(path))
    return bool(failed)


def cases() -> Iterator[Case]:
    """Every table that there should be of this machine, the quickest first."""
    for model in MODELS:
        for backend_name in targets.runnable(targets.LOCAL):
            yield from (Case(model, backend_name, threads) for threads in THREADS)


def shipped(folder: Path | None = None) -> list[tuple[Path, LatencyTable]]:
    """Tables in the package, by path."""
    return [(path, records.load(path, LatencyTable)) for path in sorted((folder or TABLES).glob("*/*.json"))]


def ship(table: LatencyTable, instead_of: list[Path], folder: Path | None = None) -> Path:
    """Store a table, and remove those that it takes the place of; TableError for one that is not sound."""
    table = rounded(table)
    table_check.check(table, "time it again, on an idle machine")
    path = latency_table.path_for(folder or TABLES, table)
    records.write_atomic(path, compact(table))
    for old in instead_of:
        if old != path:
            old.unlink()
    return path


def compact(table: LatencyTable) -> bytes:
    """A record file without what it would have anyway: spaces, and fields with their defaults."""
    return msgspec.json.encode({"record": "LatencyTable", "version": LatencyTable.version, "data": _plain(table)}) + b"\n"


def rounded(table: LatencyTable) -> LatencyTable:
    """The same table with fewer digits in its rows."""
    rows = tuple(msgspec.structs.replace(r, latency=_rounded(r.latency), reach=_shortened(r.reach)) for r in table.rows)
    return msgspec.structs.replace(table, rows=rows)


def describe(path: Path) -> str:
    table = records.load(path, LatencyTable)
    noisy = sum(row.noisy for row in table.rows)
    worth = f"{len(table.rows)} rows ({noisy} noisy), {latency_table.error_text(table)}, drift {table.drift:.1%}, {table.seconds:.0f} s"
    return f"{path.relative_to(PACKAGE.parent)}: {worth}, {path.stat().st_size / 1e3:.0f} kB"


def check() -> int:
    """Says what is wrong with which table; 1 if anything is."""
    now, wrong = latency_table.lowering_digest(), 0
    for path, table in shipped():
        faults = list(table_check.faults(table))
        if dict(table.environment.must_match).get("lowering") != now:
            faults.append("timed with another lowering: it is found nowhere")
        wrong += bool(faults)
        print(f"{path.relative_to(PACKAGE.parent)}: {'; '.join(faults) or 'fits'}")
    return bool(wrong)


def _rounded(q: Quantity) -> Quantity:
    return msgspec.structs.replace(q, value=_short(q.value), quantiles=_shortened(q.quantiles))


def _shortened(pairs: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
    return tuple((place, _short(value)) for place, value in pairs)


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _plain(value: Any) -> Any:
    """Plain values, fields that have their defaults left out."""
    if isinstance(value, msgspec.Struct):
        fields = ((f, getattr(value, f.name)) for f in msgspec.structs.fields(value))
        return {f.encode_name: _plain(v) for f, v in fields if f.default is msgspec.NODEFAULT or v != f.default}
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    return value


if __name__ == "__main__":
    sys.exit(main())

"""What comes back from a kit ▸ a latency table: checked as what anybody may have written, then profiled from as if it were here."""

from __future__ import annotations

import json
import math
import stat
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

import msgspec

import nascompile
from nascompile import kit_limits, latency_table, models, profiler, table_check
from nascompile.devices import Job
from nascompile.devices.interleave import STATISTIC
from nascompile.errors import NascompileError, RecordError, TableError, UnsupportedError
from nascompile.kit import MANIFEST, REFERENCE, RESULTS, KitManifest, KitWindow, form_for, graph_id, integers_of, kit_digest
from nascompile.progress import Progress
from nascompile.records import Candidate, Environment, LatencyTable, Operator, Pairs, Quantity, Record, Target

R = TypeVar("R", bound=Record)

FILE_BYTES = 64 * 2**20
"""Most that a manifest or results may have: those of a hundred thousand graphs would fit."""
ARCHIVE_BYTES, ARCHIVE_FILES, RATIO = 4 * 2**30, 50_000, 2000
"""Most that an archive may unpack to, files in it, and bytes for each compressed one."""
LONGEST_MS, SHORTEST_MS = 600_000.0, 1e-6
"""No call of a graph of a kit takes ten minutes, and none less than a nanosecond."""
MOST_SAMPLES = 10**9
WORD = 500
"""Longest name or value of an environment."""


class KitTiming(Record, frozen=True):
    """Quantiles in ms of one graph in one window."""

    n: int
    quantiles: tuple[tuple[float, float], ...]


class KitWindowResult(Record, frozen=True):
    """One window: graph ▸ timing, the reference among them; and the same from a second timing if the first was disturbed."""

    window: int
    seconds: float
    first: dict[str, KitTiming]
    again: dict[str, KitTiming]


class KitEnvironment(Record, frozen=True):
    """Where a kit was run."""

    device: tuple[tuple[str, str], ...]
    versions: tuple[tuple[str, str], ...]
    recorded: tuple[tuple[str, str | int | float | None], ...]


class KitResults(Record, frozen=True):
    """`results.json` as `run_kit.py` leaves it."""

    kit: str
    emulated: bool
    environment: KitEnvironment
    windows: tuple[KitWindowResult, ...]
    seconds: float


def table_of(results: Path, kit: Path | None, progress: Progress, again: str = "") -> LatencyTable:
    """The table of a kit that was run: `results` is `results.json`, or the folder or .zip it is in; `kit`: where it is not beside it.

    `again`: what makes it time everything once more, to be said where its numbers cannot be used.
    RecordError for what cannot be read or believed, TableError for results that are of another kit or made by another lowering.
    """
    content = _read(results, RESULTS)
    manifest_bytes = _read(kit or (results.parent if results.name == RESULTS else results), MANIFEST)
    manifest, found = _decoded(manifest_bytes, KitManifest, MANIFEST), _decoded(content, KitResults, RESULTS)
    again = again or "remove results.jsonl on the device and run the kit again"
    _check_origin(manifest, manifest_bytes, found)
    _check_numbers(manifest, found, again)
    with tempfile.TemporaryDirectory() as folder:
        device = _Recorded(manifest, found)
        try:
            bench = _replay(manifest, Path(folder))
            table = profiler.fill(bench, device, progress, seconds=manifest.seconds, networks=manifest.networks)
        except NascompileError:
            raise
        except Exception as error:  # a configuration may make any library fail in any way
            raise RecordError("the kit's manifest does not fit together", detail=f"{type(error).__name__}: {error}", hint=AGAIN) from error
    if left := device.left:
        raise TableError(
            f"{left} of the kit's {len(manifest.windows)} windows are not asked for by this version of nascompile",
            detail=f"the kit was made by {manifest.nascompile}", hint=AGAIN,
        )  # fmt: skip
    table = msgspec.structs.replace(table, seconds=found.seconds)
    table_check.check(table, again)
    return table


def times_of(content: bytes, kit: Path) -> dict[str, Quantity]:
    """Graph ▸ latency, from the results of a kit of one window; the kit is a folder. Raises as `table_of` does."""
    manifest_bytes = _read(kit, MANIFEST)
    manifest, found = _decoded(manifest_bytes, KitManifest, MANIFEST), _decoded(content, KitResults, RESULTS)
    _check_origin(manifest, manifest_bytes, found)
    _check_numbers(manifest, found, "run the same command again")
    return {name: _quantity(timing, "measured") for name, timing in found.windows[0].first.items()}


AGAIN = "export the kit again with this version of nascompile and run it again"


def must_match(device: Pairs, versions: Pairs, target: Target, lowering: str) -> Pairs:
    """The environment's fields, as `devices/cpu.py` and `cuda.py` have them."""
    session = ((f"session.{name}", value) for name, value in target.session)
    return (*device, ("threads", target.threads), *session, *versions, ("lowering", lowering))


# ---------------------------------------------------------------------------------------------- reading


def _read(place: Path, name: str) -> bytes:
    """A file by itself, in a folder, or in an archive; nothing is unpacked."""
    if place.is_dir():
        place = place / name
    try:
        if place.suffix == ".zip":
            return _read_archived(place, name)
        if place.stat().st_size > FILE_BYTES:
            raise RecordError(f"{place} is too large for a {name}: {place.stat().st_size:,} bytes", hint=f"at most {FILE_BYTES:,}")
        return place.read_bytes()
    except FileNotFoundError as error:
        hint = "run `python3 run_kit.py` on the device to its end" if name == RESULTS else "name the kit that was run with --kit"
        raise RecordError(f"no such file: {place}", hint=hint) from error
    except OSError as error:
        raise RecordError(f"cannot read {place}", detail=str(error.strerror or error)) from error


def _read_archived(path: Path, name: str) -> bytes:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            _check_archive(path, entries)
            wanted = [e for e in entries if PurePosixPath(e.filename).name == name and len(PurePosixPath(e.filename).parts) <= 2]
            if len(wanted) != 1:
                hint = "run the kit to its end and pack its folder again" if name == RESULTS else "name the kit that was run with --kit"
                raise RecordError(f"{path} holds {len(wanted)} files {name}, not one", hint=hint)
            if wanted[0].file_size > FILE_BYTES:
                raise RecordError(f"{name} in {path} is too large: {wanted[0].file_size:,} bytes", hint=f"at most {FILE_BYTES:,}")
            with archive.open(wanted[0]) as stream:
                content = stream.read(FILE_BYTES + 1)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:  # damaged, an unknown method, a password
        raise RecordError(f"cannot read the archive {path}", detail=str(error), hint="pack the kit's folder again") from error
    if len(content) > FILE_BYTES:
        raise RecordError(f"{name} in {path} is larger than its archive says", hint="pack the kit's folder again")
    return content


def _check_archive(path: Path, entries: Sequence[zipfile.ZipInfo]) -> None:
    """RecordError for an archive that no kit makes: names that lead out of its folder, links, or more than it could hold."""
    if len(entries) > ARCHIVE_FILES:
        raise RecordError(f"{path} has too many files: {len(entries):,}", hint=f"at most {ARCHIVE_FILES:,}")
    for entry in entries:
        name = entry.orig_filename.replace("\\", "/")
        if name.startswith("/") or ".." in name.split("/") or ":" in name or "\0" in name:
            raise RecordError(f"{path} has a file that would be outside of its folder: {entry.orig_filename!r}", hint="do not unpack it")
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise RecordError(f"{path} has a link: {entry.filename!r}", hint="a kit has none; do not unpack it")
        if entry.file_size > RATIO * max(1, entry.compress_size):
            raise RecordError(f"{path} has a file that unpacks to {entry.file_size:,} bytes: {entry.filename!r}", hint="do not unpack it")
    if (total := sum(entry.file_size for entry in entries)) > ARCHIVE_BYTES:
        raise RecordError(f"{path} would unpack to {total:,} bytes", hint=f"at most {ARCHIVE_BYTES:,}")


def _decoded(content: bytes, kind: type[R], name: str) -> R:
    try:
        body = msgspec.json.decode(content)  # refuses NaN and infinities, which are no JSON
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise RecordError(f"{name} is damaged", detail=str(error), hint="copy it again") from error
    head = (body.get("record"), body.get("version")) if isinstance(body, dict) else type(body).__name__
    if head != (kind.__name__, kind.version):
        raise RecordError(f"{name} is not a {kind.__name__} of version {kind.version}: {head}", hint=AGAIN)
    try:
        return msgspec.convert(body.get("data"), kind)
    except msgspec.ValidationError as error:
        raise RecordError(f"{name} does not have the form of a {kind.__name__}", detail=str(error), hint=AGAIN) from error


# ---------------------------------------------------------------------------------------------- believing


def _check_origin(manifest: KitManifest, manifest_bytes: bytes, found: KitResults) -> None:
    """TableError unless the results are of this kit, and the kit of this lowering."""
    if found.kit != (sha := kit_digest(manifest_bytes)):
        raise TableError(f"the results belong to another kit: {found.kit[:16]}", detail=f"this is kit {sha[:16]}", hint="give --kit")
    if manifest.lowering != latency_table.lowering_digest():
        raise TableError(
            f"the kit's graphs are not those that this version makes: lowering {manifest.lowering}",
            detail=f"here it is {latency_table.lowering_digest()}; the kit was made by {manifest.nascompile}", hint=AGAIN,
        )  # fmt: skip


def _check_numbers(manifest: KitManifest, found: KitResults, again: str) -> None:
    """RecordError listing everything that is missing, that nothing asked for, or that no clock can have said."""
    faults = [f"environment: {fault}" for fault in _word_faults(found.environment)]
    if not 0 <= found.seconds < math.inf:
        faults.append(f"seconds: {found.seconds}")
    numbers = [w.window for w in found.windows]
    if numbers != list(range(len(manifest.windows))):
        missing = sorted(set(range(len(manifest.windows))) - set(numbers))
        faults.append(f"windows {missing} are missing" if missing else f"windows are not 0 to {len(manifest.windows) - 1}: {numbers}")
    for window, result in zip(manifest.windows, found.windows, strict=False):
        faults += [f"window {result.window}: {fault}" for fault in _window_faults(window, result, manifest.method.levels)]
    if faults:
        more = [f"and {len(faults) - 20} more"] if len(faults) > 20 else []
        raise RecordError(
            f"the results cannot be believed: {len(faults)} fault{'s' * (len(faults) > 1)}", detail="\n".join([*faults[:20], *more]),
            hint=again,
        )  # fmt: skip


def _word_faults(environment: KitEnvironment) -> list[str]:
    faults, known = [], {"cpu", "isa", "gpu", "compute_capability", "driver", "onnxruntime", "openvino"}
    if not environment.device or not environment.versions:
        faults.append("it does not say what device or which version")
    faults += [f"unknown field {name[:40]!r}" for name, _ in (*environment.device, *environment.versions) if name not in known]
    for name, word in (*environment.device, *environment.versions, *environment.recorded):
        if len(name) > WORD or (isinstance(word, str) and (len(word) > WORD or not word.isprintable())):
            faults.append(f"{name[:40]!r} is no plain word")
        if isinstance(word, float) and not math.isfinite(word):
            faults.append(f"{name} is {word}")
    return faults


def _window_faults(window: KitWindow, result: KitWindowResult, levels: tuple[float, ...]) -> list[str]:
    expected = {*window.graphs, *([REFERENCE] if window.reference else [])}
    faults = [f"{name} was not timed" for name in sorted(expected - result.first.keys())]
    faults += [f"{name[:40]!r} was timed and not asked for" for name in sorted(result.first.keys() - expected)]
    faults += [f"{name[:40]!r} was timed again and not asked for" for name in sorted(result.again.keys() - expected)]
    if not 0 <= result.seconds < math.inf:
        faults.append(f"seconds: {result.seconds}")
    for name, timing in (*result.first.items(), *result.again.items()):
        faults += [f"{name[:40]}: {fault}" for fault in _timing_faults(timing, levels)]
    if result.again:
        faults += [f"{name} was not timed again with the others" for name in sorted(expected - result.again.keys())]
    elif window.again_seconds and not faults and profiler.disturbed([_quantity(t, "measured") for t in result.first.values()]):
        faults.append("it was disturbed and not timed again")
    return faults


def _timing_faults(timing: KitTiming, levels: tuple[float, ...]) -> list[str]:
    found, values = tuple(level for level, _ in timing.quantiles), [value for _, value in timing.quantiles]
    faults = []
    if not 1 <= timing.n <= MOST_SAMPLES:
        faults.append(f"{timing.n} samples")
    if found != levels:
        faults.append(f"quantiles {list(found)}, expected {list(levels)}")
    faults += [f"{value} ms is not a number" for value in values if not math.isfinite(value)]
    faults += [f"{value} ms is not possible" for value in values if math.isfinite(value) and not SHORTEST_MS <= value <= LONGEST_MS]
    if not faults and values != sorted(values):
        faults.append(f"quantiles do not ascend: {values}")
    return faults


# ---------------------------------------------------------------------------------------------- the profile, once more


@dataclass(frozen=True)
class _Replay(profiler.Bench):
    """A bench whose jobs are names: what they ran is on the device."""

    manifest: KitManifest

    def operator(self, operator: Operator, repeat: int, scratch: Path) -> Job:
        return Job(graph_id(operator, repeat), None, {})

    def network(self, candidate: Candidate, scratch: Path) -> Job:
        return Job(candidate.id, None, {})

    def pick(self, table: LatencyTable, count: int) -> tuple[Candidate, ...]:
        """The kit's."""
        return self.timed

    @property
    def timed(self) -> tuple[Candidate, ...]:
        """Whole networks in the order of the windows that they are in."""
        candidates = {g.id: g.candidate for g in self.manifest.graphs if g.candidate}
        return tuple(candidates[name] for window in self.manifest.windows for name in window.graphs if name in candidates)


def _replay(manifest: KitManifest, folder: Path) -> _Replay:
    """The bench of a kit's model; RecordError where its configuration or its search space names more than a kit may hold."""
    kit_limits.check_config(manifest.config)
    (folder / "config.json").write_text(json.dumps(manifest.config), encoding="utf-8")
    config = models.read_config(folder)
    family, form = models.family_of(config.model_type), form_for(manifest.target.backend, manifest.provider, "any")
    bench = _Replay(family, config, manifest.space, manifest.target, form, folder / "work", manifest.seed, manifest)
    kit_limits.check_space(family, config, manifest.space, manifest.target, manifest.networks, bench.timed)
    return bench


@dataclass
class _Recorded:
    """The device as it was: answers by name, window by window."""

    manifest: KitManifest
    found: KitResults
    next: int = 0
    again: dict[str, KitTiming] = field(default_factory=dict)
    name = "recorded"
    deterministic = False

    @property
    def left(self) -> int:
        return len(self.found.windows) - self.next

    def environment(self, target: Target, versions: tuple[tuple[str, Any], ...]) -> Environment:
        """The fields of `devices/cpu.py` and `cuda.py`, and whatever keeps the table from passing for another."""
        there, manifest = self.found.environment, self.manifest
        special: list[tuple[str, Any]] = []
        if manifest.integers and manifest.integers != self._own_integers():
            special.append(("integers", manifest.integers))  # nascompile itself would build another form there
        if self.found.emulated:
            special.append(("emulated", True))
        return Environment(
            must_match=(*must_match(there.device, there.versions, target, manifest.lowering), *special),
            recorded=(*there.recorded, ("nascompile", nascompile.__version__), ("kit", self.found.kit)),
        )  # fmt: skip

    def _own_integers(self) -> str:
        there = self.found.environment
        flags = dict(there.device).get("isa", "").split()
        return integers_of(str(dict(there.recorded).get("machine", "")), frozenset(flags))

    def reference(self) -> Job:
        return Job(REFERENCE, None, {})

    def time(self, jobs: Sequence[Job], *, seconds: float, seed: int, min_samples: int = 30) -> tuple[Quantity, ...]:
        """What was measured; TableError if the profiler asks for other windows than when the kit was made."""
        names = [job.name for job in jobs]
        if self.again and set(names) <= self.again.keys():
            timings, self.again = self.again, {}
        else:
            asked = set(names) - {REFERENCE}
            if not self.left or asked != set(self.manifest.windows[self.next].graphs):
                raise TableError(
                    "this version of nascompile times other graphs than the kit holds",
                    detail=f"the kit was made by {self.manifest.nascompile}", hint=AGAIN,
                )  # fmt: skip
            result = self.found.windows[self.next]
            timings, self.again, self.next = result.first, dict(result.again), self.next + 1
        kind: Literal["measured", "simulated"] = "simulated" if self.found.emulated else "measured"
        return tuple(_quantity(timings[name], kind) for name in names)

    def unavailable(self) -> str:
        return ""

    def describe(self) -> str:
        return "a device that is not here"

    def throughput(self, job: Job, batch: int, seconds: float) -> Quantity:
        raise UnsupportedError("a kit brings latencies back, and nothing else")

    def peak_memory(self, backend: str, folder: str, target: Target, inputs: Mapping[str, Any]) -> int:
        raise UnsupportedError("a kit brings latencies back, and nothing else")


def _quantity(timing: KitTiming, kind: Literal["measured", "simulated"]) -> Quantity:
    return Quantity(value=dict(timing.quantiles)[STATISTIC], unit="ms", kind=kind, n=timing.n, quantiles=timing.quantiles)

"""The engine folder: written whole or not at all, verified file by file, loaded without torch.

`manifest.json` (EngineManifest, sha256 of every other file), the backend's graph files, `config.json`, preprocessing files,
`candidate.json`, `sample.npz` (inputs and expected outputs), `run.py` (runs the folder without nascompile, where the backend has one).
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from nascompile import latency_table, plugins, records
from nascompile.backends import Backend, CrossCompiler, Runner
from nascompile.errors import DataError, RecordError, UnsupportedError
from nascompile.families import InputSpec
from nascompile.latency_table import FOREIGN
from nascompile.records import Candidate, Differences, EngineManifest, Interval, OperatorGraph, SearchSpace, Target, Variant

if TYPE_CHECKING:
    from nascompile.preprocess import Preprocessor

Arrays = dict[str, npt.NDArray[Any]]

MANIFEST, SAMPLE, CONFIG, CANDIDATE, RUN = "manifest.json", "sample.npz", "config.json", "candidate.json", "run.py"
IGNORED = ("__pycache__",)
"""What running `run.py` may leave behind."""


@dataclass(frozen=True)
class Parts:
    """Everything an engine folder is made of, apart from the backend."""

    name: str
    role: Literal["baseline", "uniform", "candidate"]
    target: Target
    form: Any
    """What lowering made, in the form the backend accepts."""
    inputs: tuple[InputSpec, ...]
    task: str
    labels: tuple[str, ...]
    config: Mapping[str, Any]
    """Hugging Face configuration of the parent, `id2label` of the head included."""
    sample: Mapping[str, npt.NDArray[Any]]
    """Inputs of one call."""
    expected: Mapping[str, npt.NDArray[Any]] | None = None
    """What another implementation computes for the sample; None: what the engine itself computes now."""
    tolerance: float = 1e-3
    preprocessing: Mapping[str, bytes] | None = None
    """File name ▸ content."""
    outputs: tuple[str, ...] = ("logits",)
    candidate: Candidate | None = None
    space: SearchSpace | None = None
    graph: OperatorGraph | None = None
    predicted: Interval | None = None
    table_digest: str = ""
    foreign: Differences = ()
    weights_digest: str = ""
    versions: tuple[tuple[str, Any], ...] = ()
    build_seconds: float = 0.0
    executed: bool = True
    """False: there is nothing here to run it on; `expected` must be given and is believed."""
    remarks: tuple[str, ...] = ()
    variants: tuple[Variant, ...] = ()
    """What it was chosen from."""


class Check(NamedTuple):
    """One thing `verify` looked at and found right."""

    name: str
    detail: str


# ---------------------------------------------------------------------------------------------- writing


def write(folder: Path, parts: Parts, backend: Backend) -> EngineManifest:
    """Build the engine beside `folder` and put it there at the end; RecordError if the sample comes out wrong or the disk is full."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        manifest = _fill(work, parts, backend)
        _exchange(work, folder)
        return manifest
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RecordError(
                f"no space left on the disk to write engine {parts.name}", detail=f"folder: {folder.parent}",
                hint="free some space and run the same command again; everything finished so far is kept",
            ) from error  # fmt: skip
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _fill(work: Path, parts: Parts, backend: Backend) -> EngineManifest:
    graphs = backend.build(parts.form, parts.target, work)
    for name, content in (parts.preprocessing or {}).items():
        if Path(name).name != name or name in (MANIFEST, SAMPLE, CONFIG, CANDIDATE, RUN, *graphs):
            raise RecordError(f"an engine folder cannot hold a preprocessing file of this name: {name}")
        (work / name).write_bytes(content)
    (work / CONFIG).write_text(json.dumps(parts.config, indent=1, sort_keys=True, default=str) + "\n", encoding="utf-8")
    if script := getattr(backend, "run_script", "run_template.py"):
        (work / RUN).write_bytes(Path(__file__).with_name(script).read_bytes())
    if parts.candidate is not None:
        records.save(parts.candidate, work / CANDIDATE)
    (work / SAMPLE).write_bytes(_npz(parts.sample, _checked_outputs(work, graphs, parts, backend)))
    blocks = parts.graph.nodes if parts.graph else ()
    manifest = EngineManifest(
        name=parts.name, role=parts.role, target=parts.target, graphs=graphs, outputs=parts.outputs, labels=parts.labels, task=parts.task,
        files=tuple((p.relative_to(work).as_posix(), records.file_digest(p)) for p in sorted(work.rglob("*")) if p.is_file()),
        inputs=tuple((spec.name, spec.dtype, spec.shape) for spec in parts.inputs),
        candidate=parts.candidate, space=parts.space, graph=parts.graph, predicted=parts.predicted,
        precision_counts=tuple(sorted(Counter(node.operator.precision.name for node in blocks).items())),
        table_digest=parts.table_digest, foreign=parts.foreign, weights_digest=parts.weights_digest, versions=parts.versions,
        tolerance=parts.tolerance, parameters=sum(node.parameters for node in blocks),
        size_bytes=sum((work / name).stat().st_size for name in graphs),
        build_seconds=parts.build_seconds, executed=parts.executed, remarks=parts.remarks, variants=parts.variants,
        chip=on_chip(work) if (on_chip := getattr(backend, "on_chip", None)) else None,
    )  # fmt: skip
    records.save(manifest, work / MANIFEST)
    return manifest


def _checked_outputs(work: Path, graphs: tuple[str, ...], parts: Parts, backend: Backend) -> Mapping[str, npt.NDArray[Any]]:
    """Outputs to keep as the sample's: the expected ones, which the engine must give if it can run here."""
    if not parts.executed:
        if parts.expected is None:
            raise ValueError("an engine that is not run needs the outputs it should give")
        return parts.expected
    found = backend.load(work, graphs, parts.target).run(parts.sample)
    expected = found if parts.expected is None else parts.expected
    _compare(found, expected, parts.tolerance, parts.name)
    return expected


def _npz(inputs: Mapping[str, npt.NDArray[Any]], outputs: Mapping[str, npt.NDArray[Any]]) -> bytes:
    stream = io.BytesIO()
    arrays = {f"input.{k}": v for k, v in inputs.items()} | {f"output.{k}": v for k, v in outputs.items()}
    np.savez_compressed(stream, allow_pickle=False, **arrays)
    return stream.getvalue()


def _exchange(work: Path, folder: Path) -> None:
    """Put `work` where `folder` is; an engine that was there goes once the new one is complete."""
    work.chmod(0o755)  # mkdtemp makes it private
    if not folder.exists():
        os.replace(work, folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    os.replace(folder, old / "old")
    os.replace(work, folder)
    shutil.rmtree(old, ignore_errors=True)


# ---------------------------------------------------------------------------------------------- reading


def read_manifest(folder: Path) -> EngineManifest:
    """The manifest of an engine folder; RecordError if there is none or it is damaged."""
    if not (folder / MANIFEST).is_file():
        raise RecordError(f"not an engine folder, it has no {MANIFEST}: {folder}", hint="engines are in the `engines` folder of a run")
    return records.load(folder / MANIFEST, EngineManifest, damaged="build the engine again")


def read_sample(folder: Path) -> tuple[Arrays, Arrays]:
    """(inputs, expected outputs) of the reference sample."""
    try:
        with np.load(folder / SAMPLE, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError) as error:
        raise RecordError(f"damaged file: {folder / SAMPLE}", detail=str(error), hint="build the engine again") from error
    sides = [{n.partition(".")[2]: a for n, a in arrays.items() if n.startswith(side)} for side in ("input.", "output.")]
    return sides[0], sides[1]


def verify(folder: Path) -> tuple[Check, ...]:
    """What was checked: the hash of every file, no file too many, the sample re-run; RecordError naming every fault.

    The sample of an engine that was built for another device is run only where that device is; else the last check says so.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    checks, faults = [], []
    for name, digest in manifest.files:
        path = folder / name
        if not _inside(folder, path):
            faults.append(f"file outside the folder: {name}")
        elif not path.is_file():
            faults.append(f"missing file: {name}")
        elif records.file_digest(path) != digest:
            faults.append(f"changed file: {name}")
        else:
            checks.append(Check(name, f"sha256 {digest[:12]}…"))
    backend = plugins.get("backends", manifest.target.backend)
    known, made = {name for name, _ in manifest.files} | {MANIFEST}, set(getattr(backend, "products", ()))
    found = (p for p in sorted(folder.rglob("*")) if p.is_file() and not set(p.relative_to(folder).parts) & set(IGNORED))
    found = (p for p in found if p.relative_to(folder).parts[0] not in made)
    faults += [f"unknown file: {name}" for p in found if (name := p.relative_to(folder).as_posix()) not in known]
    faults += [f"not among the hashed files: {name}" for name in (*manifest.graphs, SAMPLE) if name not in known]
    if faults:
        raise RecordError(f"engine {manifest.name} is not as it was built: {folder}", detail="\n".join(faults), hint="build it again")
    inputs, expected = read_sample(folder)
    if manifest.foreign:
        checks.append(Check("prediction", f"of {FOREIGN}: {'; '.join(latency_table.difference_lines(manifest.foreign))}"))
    unrun = not manifest.executed and isinstance(backend, CrossCompiler)
    if unrun and (reason := backend.unrunnable(manifest.target)):
        return (*checks, Check("sample", f"NOT RUN, neither here nor where it was built: {reason}"))
    difference = _compare(_runner(folder, manifest).run(inputs), expected, manifest.tolerance, str(folder))
    return (*checks, Check("sample", f"largest difference {difference:.2g}, accepted {manifest.tolerance:.2g}"))


def _inside(folder: Path, path: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _compare(found: Mapping[str, Any], expected: Mapping[str, Any], tolerance: float, engine: str) -> float:
    """Largest absolute difference of any output; RecordError beyond the tolerance."""
    largest = 0.0
    for name, want in expected.items():
        have = found.get(name)
        if have is None or have.shape != want.shape:
            raise RecordError(f"the sample's output {name} has shape {getattr(have, 'shape', None)}, expected {want.shape}: {engine}")
        difference = float(np.abs(np.asarray(have, np.float64) - want).max(initial=0.0))
        if not difference <= tolerance:  # NaN fails too
            raise RecordError(
                f"the sample's output {name} differs by {difference:.3g}, accepted is {tolerance:.3g}: {engine}",
                hint="integer arithmetic differs between processors without VNNI and others; build the engine on this machine",
            )
        largest = max(largest, difference)
    return largest


def _runner(folder: Path, manifest: EngineManifest, threads: int | None = None) -> Runner:
    backend = plugins.get("backends", manifest.target.backend)
    if reason := backend.unavailable():
        raise UnsupportedError(f"cannot run an engine for {backend.name} here: {reason}", hint="install the runtime and try again")
    target = manifest.target if threads is None else msgspec.structs.replace(manifest.target, threads=threads)
    runner: Runner = backend.load(folder, manifest.graphs, target)
    return runner


# ---------------------------------------------------------------------------------------------- using


@dataclass(frozen=True)
class Engine:
    """A loaded engine."""

    folder: Path
    manifest: EngineManifest
    runner: Runner

    def run(self, inputs: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        """Outputs by name for the network's own inputs."""
        return self.runner.run(inputs)

    @cached_property
    def preprocessor(self) -> Preprocessor:
        """What turns raw samples into inputs; RecordError if the folder has none."""
        from nascompile.preprocess import Preprocessor

        return Preprocessor.from_folder(self.folder)

    def logits(self, items: Sequence[Any], batch: int = 32) -> npt.NDArray[np.float32]:
        """(n, outputs) for raw samples: texts, pairs of texts, images (paths, Pillow, uint8 arrays) or vectors."""
        if isinstance(items, str | bytes):
            raise DataError("predict takes a list of samples, this is a single one", hint="put it into a list")
        output = self.manifest.outputs[0]
        rows = [self.run(self.preprocessor(items[i : i + batch], pad="longest"))[output] for i in range(0, len(items), batch)]
        return np.concatenate(rows) if rows else np.zeros((0, max(1, len(self.manifest.labels))), np.float32)

    def predict(self, items: Sequence[Any], batch: int = 32) -> list[tuple[str, float]]:
        """(label, probability) per raw sample; for regression ("", value)."""
        logits = self.logits(items, batch)
        if not self.manifest.labels:
            return [("", float(row[0])) for row in logits]
        odds = np.exp(logits - logits.max(axis=1, keepdims=True)) if len(logits) else logits
        shares = odds / odds.sum(axis=1, keepdims=True)
        return [(self.manifest.labels[int(i)], float(row[i])) for row, i in zip(shares, shares.argmax(axis=1), strict=True)]


def load(folder: str | Path, threads: int | None = None) -> Engine:
    """The engine in a folder, ready to run; `threads` overrides those it was built for."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    return Engine(folder=folder, manifest=manifest, runner=_runner(folder, manifest, threads))

"""A kit: everything a device that is not here needs to fill a latency table, and nothing that it would have to install nascompile for.

A profile is rehearsed with a device that times nothing: what it builds goes into the kit, and what it asks to be timed together becomes
the kit's windows. The weights of micro-graphs are random and speed does not depend on them, so a kit leaves them out and says how to draw
them again: it is kilobytes a graph. `kit_import.py` goes through the same profile once more with the times that come back.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import shutil
import tempfile
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

import nascompile
from nascompile import kit_limits, latency_table, lowering, network, plugins, profiler
from nascompile.backends import Backend, Runner
from nascompile.backends.onnxruntime import cpu_flags, integer_passes
from nascompile.devices import Job, interleave
from nascompile.devices.cpu import ISA
from nascompile.errors import RecipeError, UnsupportedError
from nascompile.families import Family
from nascompile.passes import PassContext
from nascompile.progress import Progress, Standing
from nascompile.records import (
    FLOAT16,
    INT8,
    Candidate,
    Environment,
    Operator,
    Precision,
    Quantity,
    Record,
    SearchSpace,
    Target,
    digest,
    file_digest,
    save,
)

MANIFEST, RESULTS, SCRIPT = "manifest.json", "results.json", "run_kit.py"
TEMPLATE = Path(__file__).with_name("kit_template.py")
REFERENCE = "reference"
PROCESSORS = ("any", "vnni", "arm", "here")
"""What multiplies integers on the device: `any` takes the form that is exact on all of them."""
EXACT, PLAIN = "u8u8", "u8s8"
"""Forms of integer products: exact on every processor; as they come, inexact on x86 without VNNI."""
CUT_BYTES = 1024
"""Weights from here on are left out of a kit's files; how to draw them takes some fifty bytes of the manifest, for each copy in a stack."""
CUT_TYPES = {"float32": np.float32, "float16": np.float16, "int8": np.int8, "uint8": np.uint8}
WANTED = {"onnxruntime": "1.17", "openvino": "2024.0", "numpy": "1.21", "python": "3.9"}
"""First versions that read what lowering writes (ONNX opset 20)."""

MIN_SAMPLES = 30
"""As `Device.time` has it."""
GPU_PRECISIONS = ("int8-symmetric",)
"""Beside FP16, for the providers that run on a GPU."""

Provider = Literal["cpu", "cuda", "tensorrt"]
"""What ONNX Runtime executes a kit's graphs with."""
Cut = tuple[int, int, str, float, float]
"""(offset in bytes, elements, NumPy dtype, mean or least, standard deviation or largest) of weights that a file lacks."""


class KitPart(Record, frozen=True):
    """A file that the runtime reads, as it is stored: without its weights."""

    path: str
    name: str
    size_bytes: int
    """With the weights."""
    cuts: tuple[Cut, ...]


class KitInput(Record, frozen=True):
    """An input of a graph and what is drawn for it: normal numbers, indices below `high`, or ones in a mask."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    high: int = 0


class KitGraph(Record, frozen=True):
    """A graph to be timed: a stack of one operator, a whole network, or (neither) the reference."""

    id: str
    parts: tuple[KitPart, ...]
    inputs: tuple[KitInput, ...]
    operator: Operator | None = None
    repeat: int = 1
    candidate: Candidate | None = None


class KitWindow(Record, frozen=True):
    """Graphs that are timed against each other."""

    graphs: tuple[str, ...]
    reference: bool
    """Whether the reference is timed beside them."""
    seconds: float
    seed: int
    min_samples: int
    again_seconds: float = 0.0
    """Seconds per graph of a second timing of a window that was disturbed, whose seed is one more; 0: there is none."""


class KitMethod(Record, frozen=True):
    """How to time: the constants of `devices/interleave.py`, and what the profiler takes as noise."""

    warm: float = interleave.WARM
    fewest_warm: int = interleave.FEWEST_WARM
    most_warm: int = interleave.MOST_WARM
    visit: float = interleave.VISIT
    sample: float = interleave.SAMPLE
    rounds: int = interleave.ROUNDS
    cap: float = interleave.CAP
    levels: tuple[float, ...] = interleave.LEVELS
    noisy: float = profiler.NOISY
    disturbed: float = profiler.DISTURBED


class KitManifest(Record, frozen=True):
    """`manifest.json` of a kit; its SHA-256 is the kit's name."""

    target: Target
    space: SearchSpace
    config: dict[str, Any]
    """Configuration of the largest network."""
    provider: Provider
    integers: Literal["", "u8u8", "u8s8"]
    """Form of its integer products; empty: there are none that a processor could get wrong."""
    seed: int
    seconds: float
    """Timing in all that was asked for; 0: by the numbers of rows and networks."""
    networks: int
    lowering: str
    """Digest of the code that made the graphs."""
    nascompile: str
    packages: tuple[str, ...]
    """What is to be installed on the device, the runtime first."""
    made_with: tuple[tuple[str, str], ...]
    """(package, version) here."""
    wanted: tuple[tuple[str, str], ...]
    """(package, least version) there."""
    isa: dict[str, str]
    """Processor flags as operating systems spell them ▸ one spelling."""
    method: KitMethod
    graphs: tuple[KitGraph, ...]
    windows: tuple[KitWindow, ...]
    files: tuple[tuple[str, str, int], ...]
    """(path, SHA-256, bytes) of every other file."""

    @property
    def operators(self) -> frozenset[Operator]:
        """Those that get a row; what a call costs gets none."""
        return frozenset(g.operator for g in self.graphs if g.operator and g.operator != profiler.CALL)

    @property
    def rows(self) -> int:
        return len(self.operators)


# ---------------------------------------------------------------------------------------------- what is lowered to


class Form:
    """A backend's forms for hardware that may be another than this machine's; builds, and loads nothing."""

    def __init__(self, backend: Backend, passes: tuple[str, ...], judge: Backend, integers: Literal["", "u8u8", "u8s8"] = "") -> None:
        """`judge`: the backend whose word holds on what precisions and widths there are."""
        self.backend, self.passes, self.judge, self.integers = backend, passes, judge, integers
        self.name, self.accepts = backend.name, backend.accepts
        self.width_multiple, self.tunable, self.rounding = judge.width_multiple, backend.tunable, backend.rounding

    def unavailable(self) -> str:
        return self.backend.unavailable()

    def supports(self, precision: Precision) -> str:
        """OpenVINO has no exact form for processors without VNNI, whatever this machine has."""
        if self.name == "openvino" and precision == INT8:
            return "" if self.integers == PLAIN else "openvino's integer products are inexact on x86 without VNNI"
        return self.judge.supports(precision)

    def versions(self) -> tuple[tuple[str, str], ...]:
        return self.backend.versions()

    def session(self) -> tuple[tuple[str, str], ...]:
        return self.backend.session()

    def build(self, form: Any, target: Target, folder: Path) -> tuple[str, ...]:
        return self.backend.build(form, target, folder)

    def load(self, folder: Path, graphs: tuple[str, ...], target: Target) -> Runner:
        raise UnsupportedError("a kit's graphs are run on the device, not here")


def form_for(backend: str, provider: Provider, processor: str) -> Form:
    """What a kit's graphs are made by. RecipeError for a combination that there is not."""
    if backend not in WANTED or backend not in plugins.names("backends"):
        raise RecipeError(f"there are no kits for {backend}", hint="--backend onnxruntime or openvino")
    if provider != "cpu" and backend != "onnxruntime":
        raise RecipeError(f"`{backend}` has no provider {provider}", hint=f"--backend onnxruntime has {', '.join(get_args(Provider))}")
    if processor not in PROCESSORS:
        raise RecipeError(f"unknown processor: {processor}", hint=f"known: {', '.join(PROCESSORS)}")
    if provider != "cpu":  # FP16 and symmetric Q/DQ in standard operators: what TensorRT reads, CUDA's provider does too
        standard = plugins.get("backends", "tensorrt")
        return Form(plugins.get("backends", backend), standard.passes, standard)
    machine, flags = {
        "any": ("x86_64", frozenset[str]()), "vnni": ("x86_64", frozenset(["avx512_vnni"])), "arm": ("aarch64", frozenset[str]()),
        "here": (platform.machine(), cpu_flags()),
    }[processor]  # fmt: skip
    return form_of(backend, machine, flags)


def form_of(backend: str, machine: str, flags: frozenset[str]) -> Form:
    """What nascompile itself would build on such a processor."""
    own, integers = plugins.get("backends", backend), integers_of(machine, flags)
    rest = tuple(name for name in own.passes if name != "unsigned_weights")
    return Form(own, (*rest, "unsigned_weights") if integers == EXACT and backend == "onnxruntime" else rest, own, integers)


def provider(name: str) -> Provider:
    """The provider of that name; RecipeError naming the known ones."""
    found: Provider | None = next((p for p in get_args(Provider) if p == name), None)
    if found is None:
        raise RecipeError(f"unknown provider: {name}", hint=f"providers of onnxruntime: {', '.join(get_args(Provider))}")
    return found


def session(own: tuple[tuple[str, str], ...], provider: str) -> tuple[tuple[str, str], ...]:
    """Session settings of a kit's target: those of the processor say nothing on a GPU."""
    if provider == "cpu":
        return own
    kept = {name: value for name, value in own if name in ("graph_optimization_level", "compute_capability")}
    return tuple(sorted((kept | {"provider": provider}).items()))


def integers_of(machine: str, flags: frozenset[str]) -> Literal["u8u8", "u8s8"]:
    """Form of the integer products that nascompile builds on such a processor."""
    return "u8u8" if integer_passes(machine, flags) else "u8s8"


# ---------------------------------------------------------------------------------------------- the rehearsal


@dataclass(frozen=True)
class _Writing(profiler.Bench):
    """A bench that keeps what it builds instead of loading it; a job's runner is a made-up latency in ms."""

    kit: Path
    graphs: dict[str, KitGraph] = field(default_factory=dict)

    def operator(self, operator: Operator, repeat: int, scratch: Path) -> Job:
        name = graph_id(operator, repeat)
        if name not in self.graphs:
            model = self._halved(self.lowered(operator, repeat), operator.precision)
            self.keep(name, model, scratch, operator=operator, repeat=repeat)
        return Job(name, repeat * _rough_ms(self.family, operator), {})

    def network(self, candidate: Candidate, scratch: Path) -> Job:
        if candidate.id not in self.graphs:
            arguments = (self.space, candidate, self.target, self.weights, self.ranges, self.backend)
            model = lowering.lower(self.blueprint, self.family, self.config, *arguments)
            self.keep(candidate.id, model, scratch, candidate=candidate)
        graph = network.graph(self.family, self.config, self.space, candidate, self.target)
        return Job(candidate.id, sum(_rough_ms(self.family, node.operator) for node in graph.nodes), {})

    def keep(self, name: str, model: Any, scratch: Path, **what: Any) -> None:
        """Store the graph without its weights."""
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            names = self.backend.build(model, self.target, Path(folder))
            stored = self.kit / "graphs" / name
            stored.mkdir(parents=True)
            parts = tuple(_store_cut(Path(folder), part, stored, _cuts(Path(folder), part, model)) for part in names)
        highs = {spec.name: spec.high for spec in self.family.inputs(self.config)}
        inputs = tuple(
            KitInput(name=n, dtype=str(array.dtype), shape=tuple(array.shape), high=highs.get(n, 0))
            for n, array in self._inputs(model).items()
        )
        self.graphs[name] = KitGraph(id=name, parts=parts, inputs=inputs, **what)

    def _halved(self, model: Any, precision: Precision) -> Any:
        """An integer block's stack with the floats that it has in a network of FP16."""
        names = {p.name for p in self.space.precisions}
        if FLOAT16.name not in names or precision == FLOAT16:
            return model
        return plugins.get("passes", "half_floats").apply(model, PassContext(parameters={}, half=True))


@dataclass
class _Rehearsal:
    """A device that times nothing and notes what is to be timed. It finds everything noisy, so that it is asked to time it again."""

    name = "rehearsal"
    windows: list[KitWindow] = field(default_factory=list)

    def environment(self, target: Target, versions: tuple[tuple[str, Any], ...]) -> Environment:
        return Environment(must_match=())

    def reference(self) -> Job:
        return Job(REFERENCE, 1.0, {})

    def time(self, jobs: Sequence[Job], *, seconds: float, seed: int, min_samples: int = 30) -> tuple[Quantity, ...]:
        names = tuple(job.name for job in jobs if job.name != REFERENCE)
        last = self.windows[-1] if self.windows else None
        if last and last.reference and set(names) == set(last.graphs) and seed == last.seed + 1:
            again = KitWindow(
                graphs=last.graphs, reference=True, seconds=last.seconds, seed=last.seed, min_samples=last.min_samples,
                again_seconds=seconds / len(names),
            )  # fmt: skip
            self.windows[-1] = again
        else:
            reference = len(names) < len(jobs)
            self.windows.append(KitWindow(graphs=names, reference=reference, seconds=seconds, seed=seed, min_samples=min_samples))
        return tuple(Quantity(value=j.runner, unit="ms", kind="simulated", quantiles=((0.1, j.runner), (0.5, 2 * j.runner))) for j in jobs)

    def unavailable(self) -> str:
        return ""

    def describe(self) -> str:
        return "a rehearsal; nothing is timed"

    def throughput(self, job: Job, batch: int, seconds: float) -> Quantity:
        raise UnsupportedError("a rehearsal runs nothing")

    def peak_memory(self, backend: str, folder: str, target: Target, inputs: Mapping[str, Any]) -> int:
        raise UnsupportedError("a rehearsal runs nothing")


def graph_id(operator: Operator, repeat: int) -> str:
    """Name of a stack: of its content, because a label leaves attributes out."""
    return digest(operator, repeat)[:12]


def _rough_ms(family: Family, operator: Operator) -> float:
    """A latency that ranks networks before anything is measured: 5e10 float32 multiply-accumulates a second, integers in proportion."""
    return 1e-3 + (family.macs(operator) if operator.dims else 0) * operator.precision.weights.bits / 32 / 5e7


# ---------------------------------------------------------------------------------------------- writing a kit


def export(
    family: Family, config: Any, space: SearchSpace, target: Target, form: Form, provider: Provider,
    seed: int, out: Path, progress: Progress, *, seconds: float = 0.0, networks: int = profiler.NETWORKS,
) -> KitManifest:  # fmt: skip
    """Write a kit to `out`, a folder or a .zip file that is not there yet. UnsupportedError if a graph cannot be built."""
    if out.exists():
        raise RecipeError(f"there is something already: {out}", hint="give another --out, or remove it")
    smaller = "a smaller model, or fewer of `search.precisions`"
    kit_limits.check_config(_shareable(config), smaller)
    kit_limits.check_space(family, config, space, target, networks, hint=smaller)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".part", dir=out.parent) as scratch:
        kit = Path(scratch) / "kit"
        kit.mkdir()
        bench = _Writing(family, config, space, target, form, Path(scratch) / "work", seed, kit)
        device = _Rehearsal()
        profiler.fill(bench, device, _Building(progress), seconds=seconds, networks=networks)
        if provider != "cpu":
            bench.keep(REFERENCE, _reference_model(), Path(scratch))
        manifest = _finish(bench, form, provider, device.windows, seconds, networks)
        if out.suffix == ".zip":
            _zip(kit, Path(scratch) / "kit.zip", out.stem)
            shutil.move(Path(scratch) / "kit.zip", out)
        else:
            shutil.move(kit, out)
    return manifest


def export_stacks(bench: profiler.Bench, stacks: Sequence[tuple[Operator, int]], out: Path, seconds: float) -> KitManifest:
    """Write a kit of a few stacks (operator, copies), timed against each other in one window: what is timed again, no table's worth."""
    out.mkdir(parents=True)
    writing = _Writing(bench.family, bench.config, bench.space, bench.target, bench.backend, bench.folder, bench.seed, out)
    for operator, copies in stacks:
        writing.operator(operator, copies, bench.folder)
    names = tuple(graph_id(*stack) for stack in stacks)
    window = KitWindow(graphs=names, reference=False, seconds=seconds, seed=bench.seed, min_samples=MIN_SAMPLES)
    return _finish(writing, writing.backend, "cpu", [window], seconds, 0)


def _finish(
    bench: _Writing, form: Any, provider: Provider, windows: Sequence[KitWindow], seconds: float, networks: int
) -> KitManifest:  # fmt: skip
    """Add script and manifest to the graphs."""
    shutil.copy(TEMPLATE, bench.kit / SCRIPT)
    manifest = KitManifest(
        target=bench.target, space=bench.space, config=_shareable(bench.config), provider=provider, integers=_integers(form, bench.space),
        seed=bench.seed, seconds=seconds, networks=networks, lowering=latency_table.lowering_digest(), nascompile=nascompile.__version__,
        packages=(_package(form.name, provider), "numpy"), made_with=form.versions(),
        wanted=tuple((name, WANTED[name]) for name in (form.name, "numpy", "python")), isa=ISA, method=KitMethod(),
        graphs=tuple(bench.graphs[name] for name in sorted(bench.graphs)), windows=tuple(windows), files=tuple(_listed(bench.kit)),
    )  # fmt: skip
    save(manifest, bench.kit / MANIFEST)
    return manifest


@dataclass(frozen=True)
class _Building:
    """Progress of a rehearsal: nothing is timed, so the profiler's words for it would mislead."""

    inner: Progress

    def stage(self, name: str, number: int, total: int) -> None:
        self.inner.stage(name, number, total)

    def step(self, label: str, done: int, total: int, limit: float = math.inf) -> None:
        self.inner.step(label.replace("timing", "building"), done, total, limit)

    def note(self, text: str) -> None:
        self.inner.note(text)

    def standing(self, found: Standing) -> None:
        self.inner.standing(found)


def _integers(form: Form, space: SearchSpace) -> Literal["", "u8u8", "u8s8"]:
    return form.integers if any(p.accumulation.kind == "int" for p in space.precisions) else ""


def _package(backend: str, provider: str) -> str:
    return "onnxruntime-gpu" if provider != "cpu" else backend


def _shareable(config: Any) -> dict[str, Any]:
    """As `config.json` has it, without the local path it came from."""
    return {key: value for key, value in json.loads(config.to_json_string(use_diff=False)).items() if key != "_name_or_path"}


def _listed(kit: Path) -> Iterator[tuple[str, str, int]]:
    for path in sorted(p for p in kit.rglob("*") if p.is_file()):
        yield path.relative_to(kit).as_posix(), file_digest(path), path.stat().st_size


def _zip(kit: Path, path: Path, top: str) -> None:
    """The folder under the name `top`."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(p for p in kit.rglob("*") if p.is_file()):
            archive.write(file, f"{top}/{file.relative_to(kit).as_posix()}")


def _reference_model() -> Any:
    """Four products of 256 × 256: work on the GPU that no change of ours makes faster."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    value = np.random.default_rng(0).standard_normal((256, 256), dtype=np.float32) / np.float32(16)
    nodes = [helper.make_node("MatMul", [f"x{i}" if i else "hidden", "w"], [f"x{i + 1}" if i < 3 else "output"]) for i in range(4)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [256, 256]) for name in ("hidden", "output")]
    graph = helper.make_graph(nodes, REFERENCE, ends[:1], ends[1:], [numpy_helper.from_array(value, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", lowering.OPSET)], ir_version=onnx.IR_VERSION_2023_5_5)


# ---------------------------------------------------------------------------------------------- leaving weights out


def _cuts(folder: Path, name: str, model: Any) -> list[Cut]:
    """Where a graph file holds weights, ascending."""
    if name.endswith(".onnx"):
        return _onnx_cuts(folder / name, model)
    if name.endswith(".bin"):
        return _openvino_cuts(folder / name)
    if name.endswith(".xml"):
        return []
    raise UnsupportedError(f"a graph of this size cannot go into a kit: it has a file {name}", hint="one ONNX file holds 2 GB")


def _onnx_cuts(path: Path, model: Any) -> list[Cut]:
    from onnx import numpy_helper

    content, found, position = path.read_bytes(), [], 0
    for tensor in model.graph.initializer:  # which the file has in this order
        raw = bytes(tensor.raw_data)
        if len(raw) < CUT_BYTES:
            continue
        while content[(position := content.index(raw[:64], position)) : position + len(raw)] != raw:
            position += 1
        if drawn := _drawn(numpy_helper.to_array(tensor)):
            found.append((position, *drawn))
        position += len(raw)
    return found


def _openvino_cuts(path: Path) -> list[Cut]:
    types = {"f32": "float32", "f16": "float16", "i8": "int8", "u8": "uint8"}
    content, found = path.read_bytes(), {}
    for data in ElementTree.parse(path.with_suffix(".xml")).iterfind(".//layer[@type='Const']/data"):
        offset, size, kind = int(data.attrib["offset"]), int(data.attrib["size"]), types.get(data.attrib["element_type"])
        if size >= CUT_BYTES and kind and (drawn := _drawn(np.frombuffer(content, kind, size // np.dtype(kind).itemsize, offset))):
            found[offset] = (offset, *drawn)  # constants of equal value share their bytes
    return [found[offset] for offset in sorted(found)]


def _drawn(array: Any) -> tuple[int, str, float, float] | None:
    """How to draw an array like this one: (elements, dtype, mean or least, deviation or largest); None: it has to be kept."""
    kind = str(array.dtype)
    if kind not in CUT_TYPES:
        return None
    if array.dtype.kind == "f":
        values = array.astype(np.float32, copy=False)
        low, high = float(values.min()), float(values.max())
        if not -1e3 < low <= high < 1e3:
            return None
        return array.size, kind, float(f"{values.mean(dtype=np.float64):.4g}"), float(f"{values.std(dtype=np.float64):.4g}")
    return array.size, kind, float(array.min()), float(array.max())


def _store_cut(folder: Path, name: str, out: Path, cuts: list[Cut]) -> KitPart:
    content, position = memoryview((folder / name).read_bytes()), 0
    stored = out / (f"{name}.cut" if cuts else name)
    with stored.open("wb") as stream:
        for offset, count, kind, _, _ in cuts:
            stream.write(content[position:offset])
            position = offset + count * np.dtype(kind).itemsize
        stream.write(content[position:])
    return KitPart(path=f"graphs/{out.name}/{stored.name}", name=name, size_bytes=len(content), cuts=tuple(cuts))


def method() -> tuple[str, KitMethod]:
    """What a kit depends on besides its graphs: the script, and how it is told to time."""
    return file_digest(TEMPLATE), KitMethod()


def kit_digest(manifest: bytes) -> str:
    """Name of a kit: the SHA-256 of its manifest as it is stored."""
    return hashlib.sha256(manifest).hexdigest()



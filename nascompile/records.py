"""Every frozen record that passes between stages or is stored, as versioned JSON; no torch.

A record file holds ``{"record": <class>, "version": <int>, "data": {…}}``. Writing is atomic (a temporary file in the same
folder, fsync, rename), so a reader sees the old file or the new one, never a part.
"""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import msgspec

from nascompile.errors import RecordError

R = TypeVar("R", bound="Record")
Pairs = tuple[tuple[str, Any], ...]
Differences = tuple[tuple[str, Any, Any], ...]
"""(field of the environment, its value where a latency table was made, its value where the table was used)."""


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every record: immutable, compared by value, serialized with sorted keys."""

    version: ClassVar[int] = 1


# ---------------------------------------------------------------------------------------------- numeric formats


class TensorFormat(Record, frozen=True):
    """How the elements of one tensor are stored: bits, sign, and what shares a scale."""

    kind: Literal["float", "int"] = "float"
    bits: int = 32
    signed: bool = True
    symmetric: bool = True
    granularity: Literal["tensor", "call", "channel", "group"] = "tensor"
    """What shares a scale: a tensor whatever it holds, so that its range is found beforehand; a tensor as it is in one call, whose range is
    found then; a channel; so many elements of a channel, one after the other."""
    group_size: int = 0


class Precision(Record, frozen=True):
    """The numeric formats of one operator. ``name`` is how a space and a person refer to it."""

    name: str
    weights: TensorFormat = TensorFormat()
    activations: TensorFormat = TensorFormat()
    kv_cache: TensorFormat = TensorFormat()
    accumulation: TensorFormat = TensorFormat()

    @property
    def calibrated(self) -> bool:
        """Whether the inputs of its products need ranges that were observed beforehand."""
        return self.activations.kind == "int" and self.activations.granularity == "tensor"

    @property
    def dynamic(self) -> bool:
        """Whether a sample's result depends on the samples it is in one call with."""
        return self.activations.granularity == "call"


FLOAT32 = Precision(name="fp32")
_S8_CHANNEL = TensorFormat(kind="int", bits=8, signed=True, symmetric=True, granularity="channel")
INT8 = Precision(
    name="int8",
    weights=_S8_CHANNEL,
    activations=TensorFormat(kind="int", bits=8, signed=False, symmetric=False, granularity="tensor"),
    accumulation=TensorFormat(kind="int", bits=32),
)
"""Static INT8: signed weights with a scale per output channel, unsigned activations with one scale and zero point per tensor."""
WEIGHT_INT8 = Precision(name="weight-int8", weights=_S8_CHANNEL)
"""Weights stored as INT8 with a scale per row and used as FP32: look-up tables."""
_F16 = TensorFormat(bits=16)
FLOAT16 = Precision(name="fp16", weights=_F16, activations=_F16, kv_cache=_F16)
"""Half precision: weights and activations; sums are float32 where the runtime has them so."""
INT8_SYMMETRIC = Precision(
    name="int8-symmetric",
    weights=_S8_CHANNEL,
    activations=TensorFormat(kind="int", bits=8),
    accumulation=TensorFormat(kind="int", bits=32),
)
"""Static INT8 without zero points: signed weights with a scale per output channel, signed activations with one scale per tensor."""
INT8_DYNAMIC = Precision(
    name="int8-dynamic",
    weights=_S8_CHANNEL,
    activations=TensorFormat(kind="int", bits=8, signed=False, symmetric=False, granularity="call"),
    accumulation=TensorFormat(kind="int", bits=32),
)
"""INT8 without calibration: weights as in static INT8, each input tensor on the unsigned grid of the range it has in that call."""


def weight_only(bits: int, group_size: int) -> Precision:
    """Weights as signed integers with a scale per `group_size` inputs of an output, multiplied as floats."""
    integers = TensorFormat(kind="int", bits=bits, granularity="group", group_size=group_size)
    return Precision(name=f"weight-int{bits}-block{group_size}", weights=integers)


WEIGHT_ONLY = tuple(weight_only(bits, size) for bits in (8, 4) for size in (32, 128))


# ---------------------------------------------------------------------------------------------- targets and numbers


class Workload(Record, frozen=True):
    """What one call of the network processes."""

    phase: Literal["forward", "prefill", "decode"] = "forward"
    batch: int = 1
    sequence: int = 0
    """Tokens per sample; 0 where the model has no sequence of its own."""
    context: int = 0
    generated: int = 0
    resolution: tuple[int, int] = (0, 0)
    """Height and width in pixels; (0, 0) where the input is no image."""
    scenario: Literal["single-stream", "offline"] = "single-stream"


class Target(Record, frozen=True):
    """Where and how an engine runs. Every cost is keyed by (metric, target)."""

    device: str
    backend: str
    workload: Workload
    threads: int = 1
    session: tuple[tuple[str, str], ...] = ()
    """Session settings of the backend, sorted by name."""

    @property
    def id(self) -> str:
        return f"{self.device}-{self.backend}-{digest(self)[:8]}"


class Quantity(Record, frozen=True):
    """A number with its unit and where it came from. ``quantiles``: ((0.5, value), …) in the same unit."""

    value: float
    unit: str
    kind: Literal["measured", "counted", "modelled", "simulated", "predicted"]
    n: int = 1
    quantiles: tuple[tuple[float, float], ...] = ()

    def quantile(self, q: float) -> float:
        for level, value in self.quantiles:
            if abs(level - q) < 1e-9:
                return value
        raise KeyError(q)


class Interval(Record, frozen=True):
    """A predicted quantity and the interval that should hold the real one with probability ``level``."""

    value: float
    low: float
    high: float
    unit: str
    level: float = 0.9


class Score(Record, frozen=True):
    """A metric of one set of weights on one split, with what is needed to trust or refuse a comparison."""

    metric: str
    direction: Literal["maximize", "minimize"]
    value: float
    n: int
    stderr: float
    split_digest: str
    weights_digest: str
    evaluator_digest: str
    """Hash of precision scheme, calibration and fidelity."""
    per_sample: tuple[float, ...] = ()
    """One value per sample (1/0 for right/wrong, or the error), for paired comparisons; may be empty."""


# ---------------------------------------------------------------------------------------------- networks


class Operator(Record, frozen=True):
    """What a table times: a group of nodes the runtime executes together, with all that its cost depends on."""

    kind: str
    dims: tuple[tuple[str, int], ...]
    """Named dimensions (batch, sequence, hidden, …) in a fixed order."""
    attributes: tuple[tuple[str, str | int | float], ...] = ()
    precision: Precision = FLOAT32

    def dim(self, name: str) -> int:
        return dict(self.dims)[name]

    @property
    def label(self) -> str:
        """For a person to read; never a key."""
        return f"{self.kind} " + " ".join(f"{k}={v}" for k, v in self.dims) + f" [{self.precision.name}]"


class Node(Record, frozen=True):
    """One operator at its place in a network."""

    name: str
    """Block name: `embedding`, `layers.3.attention`, …"""
    operator: Operator
    module: str
    """Path of the Hugging Face module."""
    genes: tuple[str, ...] = ()
    parameters: int = 0
    """Weights of the block, in elements."""
    size_bytes: int = 0
    """Bytes of the block's stored weights at its precision, scales included."""
    macs: int = 0
    """Multiply-accumulates for one call at the workload, of all tokens: as the field counts them, whatever the graph leaves out."""
    activation_bytes: int = 0
    """Bytes of activations that are alive at once while it executes, at most."""


class Edge(Record, frozen=True):
    """A tensor between nodes (indices into the graph's nodes; -1 is the outside)."""

    source: int
    target: int
    shape: tuple[int, ...]
    format: TensorFormat = TensorFormat()
    persistent: Literal["", "weights", "kv"] = ""


class OperatorGraph(Record, frozen=True):
    """What a candidate executes at a workload, in order of execution."""

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...] = ()

    @property
    def memory_bytes(self) -> int:
        """What a call needs at most: all weights as stored, and the activations of the block that has most. Counted, not measured."""
        return sum(node.size_bytes for node in self.nodes) + max((node.activation_bytes for node in self.nodes), default=0)


class Gene(Record, frozen=True):
    """One choice of the space. Active only while every required gene has at least the given value."""

    name: str
    kind: Literal["architecture", "precision"]
    choices: tuple[int | str, ...]
    """Integers in ascending order, or names of the space's precisions, cheapest storage last."""
    requires: tuple[tuple[str, int], ...] = ()


class SearchSpace(Record, frozen=True, omit_defaults=True):  # what only several targets have is in no record of one: ids stay
    """All candidates: genes, the precisions they name, and the targets that have precision genes of their own."""

    family: str
    model_digest: str
    genes: tuple[Gene, ...]
    precisions: tuple[Precision, ...]
    targets: tuple[str, ...]
    layer_order: tuple[int, ...] = ()
    """Layers by importance: depth k keeps the first k of these, executed in network order."""
    legal: tuple[tuple[str, ...], ...] = ()
    """Per target, names of the precisions its genes may have; empty: with one target, whose genes have no others."""

    @property
    def id(self) -> str:
        return digest(self)[:16]

    def precision(self, name: str) -> Precision:
        return next(p for p in self.precisions if p.name == name)


class Candidate(Record, frozen=True):
    """A point of a space: values of the *active* genes only, in the order of the space's genes."""

    space: str
    architecture: tuple[tuple[str, int], ...]
    precision: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]
    """Per target id: ((gene, precision name), …)."""

    @property
    def id(self) -> str:
        return digest(self)[:12]

    def value(self, gene: str) -> int:
        """Value of an active architecture gene; KeyError if inactive."""
        return dict(self.architecture)[gene]

    def precision_of(self, gene: str, target: str) -> str:
        """Precision name of an active precision gene for one target; KeyError if inactive."""
        return dict(dict(self.precision)[target])[gene]


class Budget(Record, frozen=True):
    """A bound on a cost. Metrics: latency_ms, size_mb, macs_m, memory_mb, drop (points of the metric, against the baseline)."""

    metric: str
    bound: float
    target: str = ""
    """Target id; empty where the metric has none (drop) or there is one target."""
    limit: bool | msgspec.UnsetType = msgspec.UNSET
    """Of the device itself: nobody had to ask for it. Not written otherwise, so that digests of choices stay what they were."""


# ---------------------------------------------------------------------------------------------- tables


class Environment(Record, frozen=True):
    """Where numbers were taken. ``must_match`` decides whether a table may be used; ``recorded`` is for people."""

    must_match: Pairs
    recorded: Pairs = ()


class TableRow(Record, frozen=True):
    """One operator's cost in context, by repeated interleaved timing."""

    operator: Operator
    latency: Quantity
    noisy: bool = False
    footprint: int = 0
    """Bytes of weights of the stack in which it was timed; 0 for what a network has once."""
    reach: tuple[tuple[float, float], ...] = ()
    """(log2 of the bytes of weights that a call reads in layers, ms more than in that stack), linear between the points, constant outside.
    From stacks of different depths."""


class Residual(Record, frozen=True):
    """A whole network's predicted and measured latency."""

    candidate: Candidate
    predicted_ms: float
    measured: Quantity


class TableCorrection(Record, frozen=True):
    """What a sum of rows leaves out and whole networks show (`table_fit.py`)."""

    factors: tuple[tuple[str, float], ...] = ()
    """Group of rows (`latency_table.group`) ▸ what they are multiplied by beside the scale."""
    change_ms: float = 0.0
    """Of a block that follows one of another precision."""
    block_ms: tuple[tuple[str, float], ...] = ()
    """Precision ▸ of each of its blocks."""
    reach: tuple[tuple[float, float], ...] = ()
    """(log2 of the bytes of weights that a call reads in layers, ms that each byte of a block costs more), beside the rows' own."""


class LatencyTable(Record, frozen=True):
    """Operators of one space timed on one target. Never edited: a correction of measured engines is another record.

    predicted = scale · (call + Σ (factor · (row + its reach at the network's bytes)) + what the correction says of changes and bytes);
    measured lies within hypot(relative_error · predicted, absolute_error_ms) of that nine times in ten.
    """

    target: Target
    environment: Environment
    rows: tuple[TableRow, ...]
    call: Quantity | None = None
    """Milliseconds that one call of the runtime takes whatever the network; counted once."""
    calibration: tuple[Residual, ...] = ()
    """Whole networks, timed after the rows, that fitted `scale` and `correction`; their predictions have neither."""
    validation: tuple[Residual, ...] = ()
    """The same networks, which give the interval: each is predicted by what was fitted to all others."""
    scale: float = 1.0
    correction: TableCorrection | None = None
    relative_error: float = 0.0
    """Half width of the 90 % interval of long calls, as a fraction, from the validation networks."""
    absolute_error_ms: float = 0.0
    """Half width of that of very short calls: what no fraction of them accounts for."""
    drift: float = 0.0
    """Largest relative change of the reference kernel between the windows in which the table was filled."""
    seconds: float = 0.0


class ForeignUse(Record, frozen=True):
    """A run predicts by a table that was made in another environment; stored beside the table, absent where there is no such thing."""

    table_digest: str
    differences: Differences


# ---------------------------------------------------------------------------------------------- results


class Elsewhere(Record, frozen=True):
    """What a candidate of a search for several devices is on one of the further ones, with the precisions it has there."""

    target: str
    """Target id."""
    score: Score
    latency: Interval
    size_bytes: int


class Evaluation(Record, frozen=True, omit_defaults=True):
    """A scored candidate: accuracy of the quantized sub-network on validation, costs from the tables; all on the (first) target."""

    candidate: Candidate
    score: Score
    latency: Interval
    size_bytes: int
    parameters: int
    macs: int
    memory_bytes: int = 0
    """Of a call: stored weights and the activations that are alive at once, counted; 0 in a journal of before it was."""
    seconds: float = 0.0
    foreign: Differences = ()
    """What differs where `latency` was predicted by a table of another environment."""
    elsewhere: tuple[Elsewhere, ...] = ()
    """The same on every further target, in the order of the front's `also`."""


class Front(Record, frozen=True, omit_defaults=True):
    """Outcome of a search: non-dominated evaluations, cheapest first, and how they were found."""

    space: SearchSpace
    target: Target
    objectives: tuple[str, ...]
    budgets: tuple[Budget, ...]
    evaluations: tuple[Evaluation, ...]
    searcher: str
    seed: int
    scored: int
    seconds: float
    hypervolume: tuple[tuple[int, float], ...] = ()
    """(candidates scored, hypervolume) as the search went on."""
    foreign: Differences = ()
    """What differs where the latencies that decided were predicted by a table of another environment."""
    also: tuple[Target, ...] = ()
    """Further targets of the same search."""
    absent: tuple[tuple[str, str], ...] = ()
    """(target id, why) of those whose engines cannot run here: their latencies are predictions of a stored table."""
    stopped: str = ""
    """Why the search ended before its evaluations were used up; empty: it did not, or has seen the whole space."""


class GeneImportance(Record, frozen=True):
    """How much a gene matters among the scored candidates: root mean square of what changes where its values are shuffled."""

    gene: str
    """As a position of the genome: the precision genes of a further target end in its number."""
    points: float
    """Of the metric, as the model of accuracy errs more."""
    ms: tuple[float, ...]
    """Per target, as the latency table says."""


class Thinning(Record, frozen=True):
    """A layer at its thinnest, the rest as it is in the base; or fewer layers."""

    layer: int
    """From 0; -1 where layers are left out."""
    change: str
    points: float
    """Of the metric lost."""
    spread: float | None
    """Standard deviation of that over the models; None where it was scored."""
    ms: tuple[float, ...]
    """Saved per target, as the latency table says."""
    kind: Literal["predicted", "scored"]
    """Where `points` come from."""


class Explanation(Record, frozen=True):
    """What the scored candidates of a search say of its genes and layers."""

    front_digest: str
    """Of the front it is about."""
    metric: str
    model: str
    """Of accuracy from genes; the one that predicts best."""
    r2: float
    """Of that model, on candidates it was not fitted to."""
    others: tuple[tuple[str, float], ...]
    """(model, its R²) of those that predict worse."""
    trust: str
    """What the R² means."""
    scored: int
    targets: tuple[str, ...]
    """As a person writes them, the first one first."""
    base: Candidate
    """Whose layers are thinned."""
    genes: tuple[GeneImportance, ...]
    layers: tuple[Thinning, ...]
    unit: str = "ms"
    """Of latencies; `modelled ms` of a microcontroller that is emulated."""


class Variant(Record, frozen=True):
    """One way to build or to run an engine that was tried: how long a call took, and why it was not kept."""

    backend: str
    session: tuple[tuple[str, str], ...] = ()
    """All session settings it was timed with."""
    setting: str = ""
    """`name=value` that was tried on top of what had been kept until then; empty: the backend as it comes."""
    latency: Quantity | None = None
    """ms per call at the target's workload, timed side by side with the others; None: it never ran."""
    ratio: Interval | None = None
    """Latency over that of what had been kept until then, where it was worth a second look."""
    predicted: Interval | None = None
    """What the latency table said, where this is what the table is for."""
    kept: bool = False
    reason: str = ""
    """Why it was not kept; empty: it was."""


class OnChip(Record, frozen=True):
    """What an engine takes of a microcontroller; its reference sample was run in QEMU."""

    ram_bytes: int
    """Arena, stack and variables."""
    ram_limit: int
    flash_bytes: int
    flash_limit: int
    stack_bytes: int
    """Deepest stack that was seen."""
    stack_limit: int
    instructions: int
    """Counted, exactly."""
    peak: str
    """Operator at which most of the arena is in use."""


class EngineManifest(Record, frozen=True):
    """`manifest.json` of an engine folder; file hashes cover every other file of the folder."""

    name: str
    role: Literal["baseline", "uniform", "candidate"]
    target: Target
    files: tuple[tuple[str, str], ...]
    """(relative path, sha256), sorted."""
    graphs: tuple[str, ...]
    inputs: tuple[tuple[str, str, tuple[str | int, ...]], ...]
    """(name, NumPy dtype, shape with symbolic dimensions as names)."""
    outputs: tuple[str, ...]
    labels: tuple[str, ...]
    task: str
    candidate: Candidate | None = None
    space: SearchSpace | None = None
    graph: OperatorGraph | None = None
    precision_counts: tuple[tuple[str, int], ...] = ()
    predicted: Interval | None = None
    table_digest: str = ""
    foreign: Differences = ()
    """What differs where that table is of another environment than the one it was used in."""
    weights_digest: str = ""
    versions: Pairs = ()
    tolerance: float = 1e-3
    """Largest absolute difference of the reference sample's outputs that `verify` accepts."""
    size_bytes: int = 0
    parameters: int = 0
    build_seconds: float = 0.0
    executed: bool = True
    """False: built, not run. It was built where its device is not, so its sample holds what the emulated network computes."""
    remarks: tuple[str, ...] = ()
    """What a reader must know about how it was built, a sentence each."""
    variants: tuple[Variant, ...] = ()
    """What was tried before this was kept: backends, then session settings; empty where nothing was compared."""
    chip: OnChip | None = None
    """Of an engine for a microcontroller."""


class Measurement(Record, frozen=True):
    """What running an engine file showed."""

    engine: str
    latency: Quantity
    """ms per call; quantiles .1 .5 .9 .99."""
    throughput: tuple[tuple[int, Quantity], ...]
    """(batch, samples per second completed in a wall-clock window)."""
    peak_memory_bytes: int
    environment: Environment
    score: Score | None = None
    """Validation accuracy of the engine file."""


class Correction(Record, frozen=True):
    """A run's residuals against the table: measured / predicted per engine, and their median."""

    table_digest: str
    residuals: tuple[tuple[str, float, float], ...]
    """(engine, predicted ms, measured ms)."""
    factor: float
    spread: float
    foreign: Differences = ()
    """What differs where the predictions are a table's of another environment."""


class Choice(Record, frozen=True):
    """The chosen engine and why; written before test is read."""

    engine: str
    reason: str
    budgets: tuple[Budget, ...]
    ranking: tuple[str, ...]
    """Engines, best first."""
    rejected: tuple[tuple[str, str], ...] = ()
    foreign: Differences | msgspec.UnsetType = msgspec.UNSET
    """What differs where the engines were found by a table of another environment; not written otherwise, so that the digests under
    which test was read stay what they were."""


class Difference(Record, frozen=True):
    """Paired difference of two engines on one split, with a 95 % bootstrap interval."""

    engine: str
    reference: str
    value: float
    low: float
    high: float
    unit: str = "points"


class TestResult(Record, frozen=True):
    """Test scores of the chosen engine and its baselines: the only reading of the test split."""

    __test__: ClassVar[bool] = False
    choice_digest: str
    scores: tuple[tuple[str, Score], ...]
    differences: tuple[Difference, ...]


class StageDone(Record, frozen=True):
    """A finished stage: skipped on the next run while the hash of its inputs and its files are unchanged."""

    stage: str
    inputs: str
    files: tuple[tuple[str, str], ...]
    seconds: float


# ---------------------------------------------------------------------------------------------- reading and writing

_ENCODER = msgspec.json.Encoder(order="deterministic")


def encode(value: Any) -> bytes:
    """Canonical JSON: keys sorted, no spaces."""
    return _ENCODER.encode(value)


def digest(*values: Any) -> str:
    """Hex SHA-256 of the values' canonical JSON."""
    return hashlib.sha256(b"\0".join(encode(value) for value in values)).hexdigest()


def file_digest(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_atomic(path: Path, content: bytes) -> None:
    """Write the whole file or nothing; RecordError on a full disk, with the old file intact."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fchmod(stream.fileno(), 0o644)  # mkstemp's own mode would hide reports from other users
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RecordError(
                f"no space left on the disk to write {path.name}: {len(content):,} bytes",
                detail=f"folder: {path.parent}",
                hint="free some space and run the same command again; everything finished so far is kept",
            ) from error
        raise


def save(record: Record, path: Path) -> None:
    """Store a record atomically."""
    body = {"record": type(record).__name__, "version": type(record).version, "data": record}
    write_atomic(path, msgspec.json.format(encode(body), indent=1))


def load(path: Path, kind: type[R], damaged: str = "remove it; the stage will write it again") -> R:
    """Read a record of one class; RecordError if it is missing, damaged (with that hint), or of another class or version."""
    try:
        body = msgspec.json.decode(path.read_bytes())
    except FileNotFoundError as error:
        raise RecordError(f"no such file: {path}", hint="run the stage that writes it first") from error
    except msgspec.DecodeError as error:
        raise RecordError(f"damaged file: {path}", detail=str(error), hint=damaged) from error
    if not isinstance(body, dict) or body.get("record") != kind.__name__ or body.get("version") != kind.version:
        found = (body.get("record"), body.get("version")) if isinstance(body, dict) else type(body).__name__
        raise RecordError(
            f"{path} is not a {kind.__name__} of version {kind.version}: {found}",
            hint="it was written by another version of nascompile; use that one, or run the stage again",
        )
    try:
        return msgspec.convert(body["data"], kind)
    except (KeyError, msgspec.ValidationError) as error:
        raise RecordError(f"damaged file: {path}", detail=str(error), hint=damaged) from error

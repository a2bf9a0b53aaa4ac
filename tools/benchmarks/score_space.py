"""Scores every candidate of a sub-space of a trained super-network once, so that searches can be replayed with nothing left to compute.

    python tools/benchmarks/score_space.py pack RUN --space demo --out PACK         # what scoring needs of a finished run, in one folder
    python tools/benchmarks/score_space.py score PACK --out FILE.npz --jobs 8 --device cuda
    python tools/benchmarks/score_space.py store RUN PACK FILE.npz --all-tokens # with the prices of the run's table, into data/

Candidates are those of `nascompile.accuracy.Evaluator`: INT8 emulated with calibrated ranges, of which the run's calibration method and
samples are used. Those that begin alike share that beginning: the network is walked as a tree, one layer at a time, so a candidate costs
little more than its last layer. FILE holds, per candidate in the order of `space.enumerate_all`, one bit per sample of validation and of
test: right or wrong. What a file holds already is not scored again; --seconds ends early, and a later call goes on. `--check N` compares
N random candidates with the evaluator's own scores.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from nascompile import data, models, network, plugins, space as spaces
from nascompile.accuracy import Evaluator
from nascompile.records import Candidate, Gene, LatencyTable, Record, SearchSpace, digest, file_digest, load, save, write_atomic
from nascompile.search import Pricing
from nascompile.settings import Recipe
from nascompile.supernet import FakeQuantizer, Observer, Supernet, by_length, load_batches, plain

Choices = Mapping[str, tuple[int | str, ...]]
INT8 = ("int8",)
SPACES: dict[str, tuple[Choices, Choices]] = {
    # gene of a layer ▸ its choices: in layers that every depth keeps, in those that a depth may drop; genes that are not named keep all
    "demo": (
        {"heads": (4, 6), "width": (256, 384, 768)},
        {"heads": (6,), "width": (384, 768), "attention.precision": INT8},
    ),
    "minilm": (
        {"heads": (6, 12), "width": (512, 1536), "attention.precision": INT8},
        {"heads": (12,), "width": (512, 1536), "attention.precision": INT8, "mlp.precision": INT8},
    ),
}  # fmt: skip
HIDDEN = "hidden"
SPLITS = ("validation", "test")
DATA = Path(__file__).resolve().parent / "data"
DIGESTS = DATA / "digests.json"


class Pack(Record, frozen=True):
    """`pack.json`: what a folder for scoring holds."""

    name: str
    space: SearchSpace
    model_type: str
    method: str
    """How activation ranges are found."""
    calibration_samples: int
    task: str
    metric: str
    seed: int
    weights_digest: str


# ---------------------------------------------------------------------------------------------- packing


def restricted(space: SearchSpace, kept: Choices, others: Choices) -> SearchSpace:
    """The space with fewer choices; every choice is one of the space's own."""
    always = space.layer_order[: int(next(g for g in space.genes if g.name == "depth").choices[0])]
    genes: list[Gene] = []
    for gene in space.genes:
        first, _, rest = gene.name.partition(".")
        layer, _, part = rest.partition(".")
        wanted = gene.choices
        if first == "layers":
            wanted = (kept if int(layer) in always else others).get(part, gene.choices)
        if unknown := set(wanted) - set(gene.choices):
            raise SystemExit(f"{gene.name} has no {sorted(map(str, unknown))}: {gene.choices}")
        genes.append(msgspec.structs.replace(gene, choices=tuple(wanted)))
    return msgspec.structs.replace(space, genes=tuple(genes))


def pack(run: Path, name: str, out: Path, half: bool) -> None:
    """Copies of a run's super-network (FP16 with `half`), data and settings; embedding rows that no sample looks up are zeros."""
    recipe = load(run / "recipe.json", Recipe)
    space = restricted(load(run / "supernet" / "manifest.json", SearchSpace), *SPACES[name])
    shutil.rmtree(out, ignore_errors=True)
    (out / "data").mkdir(parents=True)
    for part in ("preprocessor", "calibration", *SPLITS):
        shutil.copytree(run / "data" / part, out / "data" / part)
    for file in ("data/data.json", "data/access.jsonl", "choice.json"):
        shutil.copy(run / file, out / file)
    shutil.copytree(run / "supernet", out / "supernet", ignore=shutil.ignore_patterns("manifest.json", "training.json"))
    _round(out, half)
    method = json.loads((run / "calibration.json").read_text())["data"]["chosen"]
    family = models.family_of(json.loads((out / "supernet" / "config.json").read_text())["model_type"])
    save(
        Pack(
            name=name, space=space, model_type=family.name, method=method, calibration_samples=recipe.search.calibration_samples,
            task=recipe.task, metric=recipe.metric or plugins.get("tasks", recipe.task).metrics[0], seed=recipe.seed,
            weights_digest=file_digest(out / "supernet" / "model.safetensors"),
        ),
        out / "pack.json",
    )  # fmt: skip
    held = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    print(f"{name}: {spaces.size(space):,} candidates, space {space.id}, {held:,} bytes")


def _round(out: Path, half: bool) -> None:
    from safetensors.torch import load_file, save_file

    path = out / "supernet" / "model.safetensors"
    weights = load_file(path)
    words = next((name for name in weights if name.endswith("word_embeddings.weight")), "")
    if words:
        used = [data.open_split(out / "data", name, "words in use").arrays()["input_ids"] for name in ("calibration", *SPLITS)]
        rare = torch.ones(len(weights[words]), dtype=torch.bool)
        rare[torch.from_numpy(np.unique(np.concatenate([ids.ravel() for ids in used])))] = False
        weights[words] = weights[words].masked_fill(rare[:, None], 0.0)
    if half:
        weights = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    save_file(weights, path, metadata={"format": "pt"})


# ---------------------------------------------------------------------------------------------- the network, one layer at a time


def stepwise(family: Any) -> tuple[Any, Any, Any]:
    """The family's forward in three parts: inputs ▸ hidden, hidden ▸ hidden through the given layers, hidden ▸ logits."""

    class Part(type(family)):  # type: ignore[misc]
        def __init__(self, part: str) -> None:
            self.part = part

        def layout(self, config: Any) -> Any:
            found = super().layout(config)
            return found if self.part == "head" else replace(found, final_norm="")

        def embed(self, model: Any, inputs: Mapping[str, torch.Tensor], linear: Any) -> torch.Tensor:
            return super().embed(model, inputs, linear) if self.part == "embedding" else inputs[HIDDEN]  # type: ignore[no-any-return]

        def classify(self, model: Any, hidden: torch.Tensor) -> torch.Tensor:
            return super().classify(model, hidden) if self.part == "head" else hidden  # type: ignore[no-any-return]

    return Part("embedding"), Part("layer"), Part("head")


@dataclass(frozen=True)
class Step:
    """One part of a candidate's network: the embedding or a layer, with its values and the schemes of its weights."""

    layer: int | None
    shape: tuple[tuple[str, int], ...]
    schemes: tuple[tuple[str, str], ...]


class Paths:
    """Candidates as steps in execution order; the head has no genes."""

    def __init__(self, family: Any, config: Any, space: SearchSpace) -> None:
        self.space = space
        self.blocks: dict[int | None, list[Any]] = {}
        for segment in family.segments(config):
            if segment.kind != "head":
                self.blocks.setdefault(segment.layer, []).append(segment)
        self.genes: dict[int | None, list[str]] = {}
        for group in family.groups(config):
            self.genes.setdefault(group.layer, []).append(group.gene)

    def __call__(self, point: Candidate) -> tuple[Step, ...]:
        return tuple(self._step(point, layer) for layer in (None, *spaces.kept_layers(self.space, point)))

    def _step(self, point: Candidate, layer: int | None) -> Step:
        schemes = []
        for segment in self.blocks[layer]:
            precision = network.block_precision(self.space, point, segment, self.space.targets[0])
            if precision.weights.kind == "int":
                schemes += [(name, precision.name) for name in segment.quantizable]
        return Step(layer, tuple((gene, point.value(gene)) for gene in self.genes.get(layer, ())), tuple(schemes))


@dataclass
class Walker:
    """Walks candidates that are sorted by path; keeps what the last one and the next one share."""

    pack: Pack
    net: Supernet
    evaluator: Evaluator
    samples: Sequence[tuple[Mapping[str, torch.Tensor], torch.Tensor]]
    """Batches of validation and test, one after the other."""
    parts: tuple[Any, Any, Any] = field(init=False)
    floats: dict[tuple[Any, ...], tuple[list[torch.Tensor], Any]] = field(default_factory=dict)
    """Shapes of the steps so far ▸ (hidden states of the calibration samples, ranges of the last step's products)."""
    stack: list[tuple[Step, list[torch.Tensor]]] = field(default_factory=list)
    weights: dict[tuple[Any, ...], torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.parts = stepwise(self.net.family)
        family, config = self.net.family, self.net.config
        self.products = {
            layer: [(name, s.scheme) for s in family.segments(config) if s.layer == layer and s.kind != "head" for name in s.quantizable]
            for layer in (None, *range(max(family.choices(config, 1)["depth"])))
        }

    def score(self, path: tuple[Step, ...]) -> torch.Tensor:
        """(samples,) bool: which are classified right."""
        shared = 0
        while shared < min(len(path), len(self.stack)) and path[shared] == self.stack[shared][0]:
            shared += 1
        del self.stack[shared:]
        for number in range(shared, len(path)):
            step = path[number]
            linear = _Shared(dict(step.schemes), self._ranges(path[: number + 1]), self.weights, step.shape)
            before = self.stack[-1][1] if self.stack else [None] * len(self.samples)
            self.stack.append((step, [self._run(step, inputs, h, linear) for (inputs, _), h in zip(self.samples, before, strict=True)]))
        right = []
        for (inputs, labels), hidden in zip(self.samples, self.stack[-1][1], strict=True):
            logits = self.parts[2].forward(self.net.model, {**inputs, HIDDEN: hidden}, (), {}, plain)
            right.append(logits.argmax(dim=-1) == labels)
        return torch.cat(right)

    def _run(self, step: Step, inputs: Mapping[str, torch.Tensor], hidden: torch.Tensor | None, linear: Any) -> torch.Tensor:
        part, layers = (self.parts[0], ()) if step.layer is None else (self.parts[1], (step.layer,))
        given = inputs if hidden is None else {**inputs, HIDDEN: hidden}
        found: torch.Tensor = part.forward(self.net.model, given, layers, dict(step.shape), linear)
        return found

    def _ranges(self, path: tuple[Step, ...]) -> Any:
        """Ranges of the last step's products, from the float network with the same shapes."""
        key = tuple(step.shape for step in path), tuple(step.layer for step in path)
        if key not in self.floats:
            if len(path) > 1:
                self._ranges(path[:-1])
            before = self.floats[tuple(s.shape for s in path[:-1]), tuple(s.layer for s in path[:-1])][0] if len(path) > 1 else None
            step = path[-1]
            sites = {name: scheme for name, scheme in self.products[step.layer] if self.pack.space.precision(scheme).calibrated}
            observer, hidden = Observer(sites), []
            for number, (inputs, _) in enumerate(self.evaluator.calibration):
                hidden.append(self._run(step, inputs, before[number] if before else None, observer))
            self.floats[key] = hidden, observer.ranges(self.pack.method)
        return self.floats[key][1]


class _Shared(FakeQuantizer):
    """Quantized weights are those of the same slice in another candidate."""

    def __init__(self, schemes: Mapping[str, str], ranges: Any, known: dict[tuple[Any, ...], torch.Tensor], shape: Any) -> None:
        super().__init__(schemes, ranges)
        self.known, self.shape = known, shape

    def weight(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        key = (name, self.schemes[name].name, self.shape)
        if key not in self.known:
            self.known[key] = super().weight(name, weight)
        return self.known[key]


# ---------------------------------------------------------------------------------------------- scoring


@dataclass
class Opened:
    """A pack in memory, on a device."""

    pack: Pack
    walker: Walker
    order: np.ndarray[Any, Any]
    """Position in (validation, test) of every sample in the walker's batches."""
    counts: tuple[int, ...]

    @classmethod
    def of(cls, folder: Path, device: str, batch: int) -> Opened:
        """With TF32 off: products are those of the CPU up to the order of sums."""
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        found = load(folder / "pack.json", Pack)
        family = plugins.get("families", found.model_type)
        net = Supernet(family, family.load(str(folder / "supernet")).to(device)).eval()
        splits = {name: data.open_split(folder / "data", name, "scores of a whole space") for name in ("calibration", *SPLITS)}
        evaluator = Evaluator(
            net, folder / "supernet", found.space, plugins.get("tasks", found.task), found.metric, splits["calibration"],
            splits["validation"], found.method, found.calibration_samples, 0, found.seed,
        )  # fmt: skip
        evaluator.calibration = [_moved(b, device) for b in evaluator.calibration]
        batches, order, offset = [], [], 0
        for name in SPLITS:
            rows = by_length(splits[name], np.arange(len(splits[name])))
            batches += [_moved(b, device) for b in load_batches(splits[name], rows, batch)]
            order.append(rows + offset)
            offset += len(rows)
        return cls(found, Walker(found, net, evaluator, batches), np.concatenate(order), tuple(len(splits[name]) for name in SPLITS))


def _moved(batch: Any, device: str) -> Any:
    return {name: tensor.to(device) for name, tensor in batch[0].items()}, batch[1].to(device)


def sort_key(path: tuple[Step, ...]) -> Any:
    return tuple((-1 if s.layer is None else s.layer, s.shape, s.schemes) for s in path)


@torch.no_grad()
def work(folder: Path, rows: Sequence[int], device: str, batch: int, out: Path, deadline: float) -> None:
    """Scores candidates (positions in the space) and writes their bits."""
    opened = Opened.of(folder, device, batch)
    space, net = opened.pack.space, opened.walker.net
    points = list(spaces.enumerate_all(space))
    path_of = Paths(net.family, net.config, space)
    paths = {row: path_of(points[row]) for row in rows}
    done, bits, began = [], [], time.monotonic()
    for row in sorted(rows, key=lambda r: sort_key(paths[r])):
        if time.monotonic() > deadline:
            break
        right = np.empty(sum(opened.counts), dtype=bool)
        right[opened.order] = opened.walker.score(paths[row]).cpu().numpy()
        done.append(row)
        bits.append(np.concatenate([np.packbits(part) for part in np.split(right, np.cumsum(opened.counts)[:-1])]))
        if len(done) % 250 == 0:
            print(f"{device}: {len(done)} of {len(rows)}, {time.monotonic() - began:.0f} s", flush=True)
    widths = [-(-count // 8) for count in opened.counts]
    columns = np.split(np.array(bits, dtype=np.uint8).reshape(len(done), sum(widths)), np.cumsum(widths)[:-1], axis=1)
    np.savez(out, rows=np.array(done, dtype=np.int64), **dict(zip(SPLITS, columns, strict=True)))


def score(folder: Path, out: Path, jobs: int, device: str, batch: int, seconds: float, limit: int) -> None:
    """Scores what `out` lacks, in processes of their own, one a device; writes the file anew with everything known."""
    found = load(folder / "pack.json", Pack)
    deadline, total = time.monotonic() + seconds, spaces.size(found.space)
    manifest = data.load_manifest(folder / "data")
    bits = {n: np.zeros((total, -(-manifest.split(n).samples // 8)), dtype=np.uint8) for n in SPLITS}
    scored = np.zeros(total, dtype=bool)
    about = {
        "pack": digest(found), "samples": {n: manifest.split(n).samples for n in SPLITS},
        "split_digests": {n: manifest.split(n).digest for n in SPLITS},
        "device": torch.cuda.get_device_name(0) if device == "cuda" else device, "torch": torch.__version__,
    }  # fmt: skip
    if out.is_file():
        with np.load(out, allow_pickle=False) as before:
            if json.loads(str(before["about"]))["pack"] != about["pack"]:
                raise SystemExit(f"{out} holds scores of another pack")
            scored = before["scored"]
            bits = {name: before[name] for name in SPLITS}
    paths = _paths(folder, found)
    todo = sorted(np.flatnonzero(~scored).tolist(), key=lambda row: sort_key(paths[row]))
    if limit:
        todo = sorted(np.random.default_rng(0).choice(todo, min(limit, len(todo)), replace=False).tolist())
    chunks = [list(part) for part in np.array_split(np.array(todo, dtype=np.int64), jobs) if len(part)]
    with tempfile.TemporaryDirectory() as scratch:
        parts = [Path(scratch) / f"{number}.npz" for number in range(len(chunks))]
        context, running = multiprocessing.get_context("spawn"), []
        for number, chunk in enumerate(chunks):
            where = f"cuda:{number % torch.cuda.device_count()}" if device == "cuda" else device
            running.append(context.Process(target=work, args=(folder, chunk, where, batch, parts[number], deadline)))
            running[-1].start()
        for process in running:
            process.join()
        for part in (p for p in parts if p.is_file()):
            with np.load(part, allow_pickle=False) as content:
                scored[content["rows"]] = True
                for name in SPLITS:
                    bits[name][content["rows"]] = content[name]
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_suffix(".part.npz")
    np.savez_compressed(temporary, about=np.array(json.dumps(about)), scored=scored, **bits)
    os.replace(temporary, out)
    print(f"{found.name}: {int(scored.sum()):,} of {total:,} candidates scored, {out.stat().st_size:,} bytes", flush=True)
    if any(process.exitcode for process in running):
        raise SystemExit("a process failed: what the others scored is kept, call again")


def store(run: Path, folder: Path, scores: Path, all_tokens: bool) -> None:
    """Scores and the latencies that the run's table predicts, as one file of `data/` whose digest is noted in `data/digests.json`.

    `all_tokens`: prices of engines that compute all tokens up to the end, the only ones that older tables have rows for.
    """
    found, table = load(folder / "pack.json", Pack), load(run / "table.json", LatencyTable)
    with np.load(scores, allow_pickle=False) as content:
        about = json.loads(str(content["about"]))
        if about["pack"] != digest(found):
            raise SystemExit(f"{scores} holds scores of another pack than {folder}")
        if lacking := int((~content["scored"]).sum()):
            raise SystemExit(f"{scores} lacks {lacking:,} candidates: score them first")
        bits = {name: content[name] for name in SPLITS}
    family, config = plugins.get("families", found.model_type), models.read_config(folder / "supernet")
    if all_tokens:
        family = type("AllTokens", (type(family),), {"reads_first_token": False})()
    pricing = Pricing(family, config, found.space, table.target, table)
    latency = np.array([pricing.costs(point)["latency_ms"] for point in spaces.enumerate_all(found.space)])
    environment = {**dict(table.environment.must_match), **dict(table.environment.recorded)}
    about |= {
        "model": found.model_type, "weights": found.weights_digest, "metric": found.metric, "calibration": found.method,
        "table": digest(table), "table_target": found.space.targets[0], "all_tokens": all_tokens,
        "table_environment": {name: environment[name] for name in ("cpu", "threads", "onnxruntime", "lowering", "os", "kernel")},
    }  # fmt: skip
    out = DATA / f"search_{found.name}.npz"
    out.parent.mkdir(exist_ok=True)
    np.savez_compressed(
        out, about=np.array(json.dumps(about, sort_keys=True)), space=np.array(msgspec.json.encode(found.space).decode()),
        latency_ms=latency, samples=np.array([about["samples"][name] for name in SPLITS]),
        **bits,
    )  # fmt: skip
    digests = json.loads(DIGESTS.read_text()) if DIGESTS.is_file() else {}
    write_atomic(DIGESTS, (json.dumps(digests | {out.name: file_digest(out)}, indent=1, sort_keys=True) + "\n").encode())
    print(f"{out}: {len(latency):,} candidates, {latency.min():.3f} to {latency.max():.3f} ms, {out.stat().st_size:,} bytes")


def _paths(folder: Path, found: Pack) -> list[tuple[Step, ...]]:
    family, config = plugins.get("families", found.model_type), models.read_config(folder / "supernet")
    path_of = Paths(family, config, found.space)
    return [path_of(point) for point in spaces.enumerate_all(found.space)]


@torch.no_grad()
def check(folder: Path, out: Path, count: int) -> None:
    """Scored candidates against the evaluator on the CPU, on validation."""
    opened = Opened.of(folder, "cpu", 64)
    points = list(spaces.enumerate_all(opened.pack.space))
    with np.load(out, allow_pickle=False) as content:
        rows = np.random.default_rng(1).permutation(np.flatnonzero(content["scored"]))[:count]
        stored = np.unpackbits(content["validation"][rows], axis=1)[:, : opened.counts[0]]
    for row, bits in zip(rows, stored, strict=True):
        own = opened.walker.evaluator
        expected = np.empty(opened.counts[0])
        expected[own.rows] = own.score(points[row]).per_sample
        values, differ = f"{100 * bits.mean():.2f} stored, {100 * expected.mean():.2f} by the evaluator", int((bits != expected).sum())
        print(f"candidate {row}: {values}, {differ} samples differ", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    packing = verbs.add_parser("pack", help="copy what scoring needs of a finished run")
    packing.add_argument("run", type=Path)
    packing.add_argument("--space", choices=SPACES, required=True)
    packing.add_argument("--out", type=Path, required=True)
    packing.add_argument("--half", action="store_true", help="store weights as FP16")
    scoring = verbs.add_parser("score", help="score all candidates")
    scoring.add_argument("pack", type=Path)
    scoring.add_argument("--out", type=Path, required=True)
    scoring.add_argument("--jobs", type=int, default=1, help="processes; on CUDA one a GPU")
    scoring.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    scoring.add_argument("--batch", type=int, default=512)
    scoring.add_argument("--seconds", type=float, default=1e9, help="stop after so long")
    scoring.add_argument("--limit", type=int, default=0, help="score only so many, drawn at random")
    scoring.add_argument("--check", type=int, default=0, help="compare so many with the evaluator's scores, on the CPU")
    storing = verbs.add_parser("store", help="write scores and prices to the benchmark's data")
    storing.add_argument("run", type=Path, help="its table.json gives the prices")
    storing.add_argument("pack", type=Path)
    storing.add_argument("scores", type=Path)
    storing.add_argument("--all-tokens", action="store_true", help="price engines whose last layer computes all tokens")
    arguments = parser.parse_args()
    if arguments.verb == "store":
        store(arguments.run, arguments.pack, arguments.scores, arguments.all_tokens)
        return
    if arguments.verb == "pack":
        pack(arguments.run, arguments.space, arguments.out, arguments.half)
        return
    torch.set_num_threads(1)
    score(arguments.pack, arguments.out, arguments.jobs, arguments.device, arguments.batch, arguments.seconds, arguments.limit)
    if arguments.check:
        check(arguments.pack, arguments.out, arguments.check)


if __name__ == "__main__":
    main()

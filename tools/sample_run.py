"""Write a run folder of invented records, so that the report can be tried and tested without running anything.

    python tools/sample_run.py runs/sample [--layers 6] [--seed 0]

Every number is made up and the report says so.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import msgspec
import numpy as np

from nascompile import journal, records, space as spaces
from nascompile.records import (
    FLOAT32,
    INT8,
    Budget,
    Candidate,
    Choice,
    Correction,
    Difference,
    EngineManifest,
    Environment,
    Evaluation,
    Front,
    Gene,
    Interval,
    LatencyTable,
    Measurement,
    Node,
    Operator,
    OperatorGraph,
    Precision,
    Quantity,
    Residual,
    Score,
    SearchSpace,
    StageDone,
    TableRow,
    Target,
    TestResult,
    Workload,
)

NOTE = "SYNTHETIC SAMPLE: every number in this report is invented; nothing was trained, searched or measured."
LABELS = ("T-shirt/top", "Trouser", "<b>Pullover</b> & co | *knit*")
SEQUENCE, HIDDEN, HEADS, WIDTH, HEAD_DIM = 50, 160, 5, 640, 32
SCALE, CALL, ERROR = 1.02, 0.03, 0.03
TARGET = Target(
    device="synthetic-cpu", backend="onnxruntime", workload=Workload(sequence=SEQUENCE, resolution=(28, 28)), session=(("intra_op", "1"),)
)
ENVIRONMENT = Environment(
    must_match=(("cpu_model", "Synthetic Processor (invented)"), ("isa", ["avx2", "avx512_vnni"]), ("threads", 1), ("onnxruntime", "0.0")),
    recorded=(("os", "none: synthetic"), ("memory_gb", 8), ("clock_mhz", 2500)),
)


def space_of(layers: int) -> SearchSpace:
    """Depth, heads and width per layer, INT8 or FP32 per block; the order of importance is not the order of execution."""
    order = (0, *range(layers - 1, 0, -1))
    genes = [Gene(name="depth", kind="architecture", choices=tuple(range(layers // 2, layers + 1)))]
    for i in range(layers):
        place = order.index(i)
        requires = (("depth", place + 1),) if place >= layers // 2 else ()
        genes.append(Gene(name=f"layers.{i}.heads", kind="architecture", choices=(2, 3, 4, 5), requires=requires))
        genes.append(Gene(name=f"layers.{i}.width", kind="architecture", choices=(160, 320, 480, 640), requires=requires))
        names = (f"layers.{i}.{kind}.precision" for kind in ("attention", "mlp"))
        genes.extend(Gene(name=name, kind="precision", choices=("fp32", "int8"), requires=requires) for name in names)
    return SearchSpace(
        family="vit", model_digest="synthetic", genes=tuple(genes), precisions=(FLOAT32, INT8), targets=(TARGET.id,), layer_order=order
    )


def operator(kind: str, precision: Precision, **own: int) -> Operator:
    """An operator with the dimensions all blocks share."""
    return Operator(kind=kind, dims=(("batch", 1), ("sequence", SEQUENCE), ("hidden", HIDDEN), *own.items()), precision=precision)


def graph(space: SearchSpace, point: Candidate) -> OperatorGraph:
    """Blocks of a candidate with parameters, bytes and MACs."""
    precisions = dict(point.precision[0][1])
    nodes = [_node("embedding", operator("embedding", FLOAT32), 16 * HIDDEN + SEQUENCE * HIDDEN)]
    for i in spaces.kept_layers(space, point):
        for kind, gene, own, weights in (
            ("attention", "heads", {"heads": point.value(f"layers.{i}.heads")}, 4 * HIDDEN * HEAD_DIM),
            ("mlp", "width", {"width": point.value(f"layers.{i}.width")}, 2 * HIDDEN),
        ):
            name = f"layers.{i}.{kind}"
            precision = space.precision(precisions[f"{name}.precision"])
            genes = (f"layers.{i}.{gene}", f"{name}.precision")
            nodes.append(_node(name, operator(kind, precision, **own), weights * own[gene], genes))
    nodes.append(_node("head", operator("head", FLOAT32, labels=10), HIDDEN * 10))
    return OperatorGraph(nodes=tuple(nodes))


def _node(name: str, op: Operator, parameters: int, genes: tuple[str, ...] = ()) -> Node:
    bits = op.precision.weights.bits
    return Node(
        name=name, operator=op, module=f"vit.{name}", genes=genes, parameters=parameters, size_bytes=parameters * bits // 8,
        macs=parameters * SEQUENCE,
    )  # fmt: skip


def row_ms(op: Operator) -> float:
    """An invented cost: a constant and a part that grows with the width, less in INT8."""
    speed = 0.32 if op.precision == INT8 else 1.0
    own = {"attention": lambda: 0.04 + 0.027 * op.dim("heads"), "mlp": lambda: 0.03 + 0.00034 * op.dim("width")}
    return float(own[op.kind]() * speed + 0.01) if op.kind in own else {"embedding": 0.08, "head": 0.02}[op.kind]


def table_of(space: SearchSpace, rng: np.random.Generator) -> LatencyTable:
    """Rows of every operator, and a few whole networks."""
    found = [operator("embedding", FLOAT32), operator("head", FLOAT32, labels=10)]
    for precision in (FLOAT32, INT8):
        found += [operator("attention", precision, heads=h) for h in (2, 3, 4, 5)]
        found += [operator("mlp", precision, width=w) for w in (160, 320, 480, 640)]
    rows = tuple(TableRow(operator=op, latency=Quantity(value=row_ms(op), unit="ms", kind="measured", n=400)) for op in found)
    networks = []
    for _ in range(12):
        point = spaces.sample(space, rng)
        predicted = predict(space, point)
        measured = Quantity(value=predicted * float(rng.normal(1, ERROR / 1.8)), unit="ms", kind="measured", n=300)
        networks.append(Residual(candidate=point, predicted_ms=predicted, measured=measured))
    return LatencyTable(
        target=TARGET,
        environment=ENVIRONMENT,
        rows=rows,
        validation=tuple(networks),
        scale=SCALE,
        call=Quantity(value=CALL, unit="ms", kind="measured", n=400),
        relative_error=ERROR,
        seconds=41.0,
    )


def predict(space: SearchSpace, point: Candidate) -> float:
    return SCALE * (CALL + sum(row_ms(node.operator) for node in graph(space, point).nodes))


def score_of(value: float, n: int, rng: np.random.Generator) -> Score:
    """A percentage of n samples with its binomial error."""
    value = float(np.clip(value, 0, 100))
    right = tuple(float(x) for x in rng.permutation(n) < n * value / 100)
    stderr = 100 * float(np.sqrt(value / 100 * (1 - value / 100) / n))
    return Score(
        metric="accuracy", direction="maximize", value=value, n=n, stderr=stderr, split_digest="synthetic", weights_digest="synthetic",
        evaluator_digest="synthetic", per_sample=right,
    )  # fmt: skip


def accuracy_of(space: SearchSpace, point: Candidate) -> float:
    """An invented accuracy in percent that saturates with size and loses a little to INT8."""
    blocks = graph(space, point).nodes
    kept = sum(node.parameters for node in blocks) / sum(node.parameters for node in graph(space, spaces.largest(space)).nodes)
    integers = sum(node.operator.precision == INT8 for node in blocks) / len(blocks)
    return 91.6 - 6.0 * float((1 - kept) ** 2.6) - 0.35 * integers


def evaluation(space: SearchSpace, point: Candidate, rng: np.random.Generator) -> Evaluation:
    """What the search would have written for a candidate."""
    nodes, latency = graph(space, point).nodes, predict(space, point)
    score = msgspec.structs.replace(score_of(accuracy_of(space, point) + float(rng.normal(0, 0.15)), 1000, rng), per_sample=())
    return Evaluation(
        candidate=point, score=score, latency=interval(latency), size_bytes=sum(n.size_bytes for n in nodes),
        parameters=sum(n.parameters for n in nodes), macs=sum(n.macs for n in nodes), seconds=0.2,
    )  # fmt: skip


def interval(latency_ms: float) -> Interval:
    return Interval(value=latency_ms, low=latency_ms * (1 - ERROR), high=latency_ms * (1 + ERROR), unit="ms")


def non_dominated(found: list[Evaluation]) -> list[Evaluation]:
    """Accuracy up, latency down; cheapest first."""
    front: list[Evaluation] = []
    for e in sorted(found, key=lambda e: (e.latency.value, -e.score.value, e.candidate.id)):
        if not front or e.score.value > front[-1].score.value:
            front.append(e)
    return front


def write(folder: Path, layers: int = 6, seed: int = 0) -> Path:
    """The run folder, complete."""
    rng = np.random.default_rng(seed)
    space = space_of(layers)
    table = table_of(space, rng)
    scored = list({e.candidate: e for e in (evaluation(space, spaces.sample(space, rng), rng) for _ in range(220))}.values())
    # the search would have gone on from these towards mostly INT8 blocks; add some, so that the front looks like one
    for _ in range(160):
        genome = spaces.genome(space, spaces.sample(space, rng))
        genome |= {slot: "int8" for slot in genome if slot.endswith(".precision") and rng.random() < 0.85}
        scored.append(evaluation(space, spaces.candidate(space, genome), rng))
    front = non_dominated(scored)
    # a choice that drops a layer and keeps a block in FP32, so that the drawing has one of each
    mixed = [e for e in front if e.candidate.value("depth") < layers and "fp32" in dict(e.candidate.precision[0][1]).values()]
    good = [e for e in mixed if e.score.value >= 90.8] or mixed[-1:] or front[-1:]
    picks = [good[0], *(e for e in (front[len(front) // 2], front[-1]) if e is not good[0])]

    records.save(table, folder / "table.json")
    records.save(_front(space, front, scored), folder / "front.json")
    (folder / "journal.jsonl").unlink(missing_ok=True)
    for e in scored:
        journal.append(folder / "journal.jsonl", e)
    _plain(folder / "recipe.json", _recipe(folder, layers, seed))
    _plain(folder / "data" / "data.json", _data())
    residuals, tests = [], []
    engines = [("baseline", "baseline", spaces.largest(space)), ("uniform-int8", "uniform", spaces.uniform(space))]
    engines += [(f"candidate-{i + 1}", "candidate", pick.candidate) for i, pick in enumerate(picks)]
    for name, role, point in engines:
        manifest = _manifest(space, table, name, role, point)
        measured = predict(space, point) * float(rng.normal(1.03, 0.015))
        accuracy = accuracy_of(space, point)
        records.save(manifest, folder / "engines" / name / "manifest.json")
        records.save(_measurement(name, measured, score_of(accuracy + 0.05, 1000, rng)), folder / "measurements" / f"{name}.json")
        residuals.append((name, predict(space, point), measured * 0.98))
        tests.append((name, score_of(accuracy - 0.3, 2000, rng)))
    ratios = sorted(measured / predicted for _, predicted, measured in residuals)
    correction = Correction(
        table_digest=records.digest(table), residuals=tuple(residuals), factor=ratios[len(ratios) // 2], spread=ratios[-1] - ratios[0]
    )
    records.save(correction, folder / "correction.json")
    choice = Choice(
        engine="candidate-1", reason="the fastest engine within 1 point of the baseline on validation",
        budgets=(Budget(metric="drop", bound=1.0),),
        ranking=tuple(name for name, role, _ in engines if role == "candidate"), rejected=(("candidate-2", "slower at the same accuracy"),),
    )  # fmt: skip
    records.save(choice, folder / "choice.json")
    records.save(_test(choice, tests[:3]), folder / "test.json")
    pairs = [(e.candidate.id, e.score.value, e.score.value + float(rng.normal(0, 0.12))) for e in scored[:20]]
    _plain(
        folder / "agreement.json",
        {"n": 20, "mean_absolute_points": float(np.mean([abs(a - b) for _, a, b in pairs])), "kendall_tau": _tau(pairs), "pairs": pairs},
    )
    for stage, seconds in (
        ("data", 1.1),
        ("profile", 41.2),
        ("finetune", 88.0),
        ("search", 62.4),
        ("build", 9.7),
        ("measure", 34.1),
        ("rerank", 3.9),
    ):
        records.save(StageDone(stage=stage, inputs="synthetic", files=(), seconds=seconds), folder / "stages" / f"{stage}.json")
    return folder


def _front(space: SearchSpace, front: list[Evaluation], scored: list[Evaluation]) -> Front:
    steps = range(20, len(scored) + 1, 20)
    volumes = tuple((n, _volume(non_dominated(scored[:n]))) for n in steps)
    return Front(
        space=space, target=TARGET, objectives=("accuracy", "latency_ms"), budgets=(Budget(metric="drop", bound=1.0),),
        evaluations=tuple(front), searcher="nsga2", seed=7, scored=len(scored), seconds=62.4, hypervolume=volumes,
    )  # fmt: skip


def _volume(front: list[Evaluation]) -> float:
    """Area dominated up to 3 ms and down to 80 percent."""
    edges = [e.latency.value for e in front[1:]] + [3.0]
    return float(sum(max(0.0, edge - e.latency.value) * max(0.0, e.score.value - 80) for e, edge in zip(front, edges, strict=True)))


def _tau(pairs: list[tuple[str, float, float]]) -> float:
    signs = [np.sign((a[1] - b[1]) * (a[2] - b[2])) for a, b in itertools.combinations(pairs, 2)]
    return float(np.mean(signs))


def _manifest(space: SearchSpace, table: LatencyTable, name: str, role: str, point: Candidate) -> EngineManifest:
    blocks = graph(space, point)
    integers = sum(node.operator.precision == INT8 for node in blocks.nodes)
    return EngineManifest(
        name=name, role=role, target=TARGET, files=(("model.onnx", "0" * 64),), graphs=("model.onnx",),  # type: ignore[arg-type]
        inputs=(("pixel_values", "float32", ("batch", 1, 28, 28)),), outputs=("logits",), labels=LABELS, task="classification",
        candidate=point, space=space, graph=blocks, predicted=interval(predict(space, point)), table_digest=records.digest(table),
        precision_counts=tuple((k, v) for k, v in (("fp32", len(blocks.nodes) - integers), ("int8", integers)) if v),
        versions=(("onnxruntime", "0.0"), ("nascompile", "0.0")), size_bytes=sum(n.size_bytes for n in blocks.nodes) + 30_000,
        parameters=sum(n.parameters for n in blocks.nodes), build_seconds=1.9,
    )  # fmt: skip


def _measurement(name: str, p50: float, score: Score) -> Measurement:
    quantiles = ((0.1, p50 * 0.98), (0.5, p50), (0.9, p50 * 1.06), (0.99, p50 * 1.22))  # the first is what tables are made of
    gains = ((1, 0.97), (8, 1.12), (32, 1.05))
    throughput = tuple((batch, Quantity(value=1000 / p50 * gain, unit="samples/s", kind="measured", n=10)) for batch, gain in gains)
    return Measurement(
        engine=name, latency=Quantity(value=p50 * 0.98, unit="ms", kind="measured", n=1200, quantiles=quantiles), throughput=throughput,
        peak_memory_bytes=61_000_000, environment=ENVIRONMENT, score=score,
    )  # fmt: skip


def _test(choice: Choice, scores: list[tuple[str, Score]]) -> TestResult:
    values = {name: score.value for name, score in scores}
    changes = {name: values["candidate-1"] - values[name] for name in ("baseline", "uniform-int8")}
    differences = tuple(
        Difference(engine="candidate-1", reference=name, value=change, low=change - 0.62, high=change + 0.58)
        for name, change in changes.items()
    )
    return TestResult(choice_digest=records.digest(choice), scores=tuple(scores), differences=differences)


def _recipe(folder: Path, layers: int, seed: int) -> dict[str, object]:
    body = {
        "name": "Synthetic sample <ViT>", "note": NOTE, "command": ["python", "tools/sample_run.py", folder.name, "--seed", str(seed)],
        "model": "synthetic", "task": "classification", "metric": "accuracy", "device": "synthetic-cpu", "seed": seed,
        "budgets": {"max_drop": 1.0, "latency_ms": None}, "finetune": {"epochs": 2, "learning_rate": 5e-4}, "search": {"searcher": "nsga2"},
    }  # fmt: skip
    return {"record": "Recipe", "version": 1, "data": body}


def _data() -> dict[str, object]:
    splits = [
        {"name": name, "samples": n, "digest": "synthetic", "source": "invented", "class_counts": [(label, n // 3) for label in LABELS],
         "duplicates": duplicates, "conflicts": 0, "truncated": 0}
        for name, n, duplicates in (("train", 6000, 17), ("calibration", 255, 0), ("validation", 999, 3), ("test", 2001, 2))
    ]  # fmt: skip
    body = {
        "task": "classification", "label_names": LABELS, "head": "kept", "modality": "image", "max_length": 0, "splits": splits,
        "settings": {"data": "invented", "seed": 0}, "preprocessing_digest": "synthetic",
    }  # fmt: skip
    return {"record": "DataManifest", "version": 1, "data": body}


def _plain(path: Path, body: dict[str, object]) -> None:
    records.write_atomic(path, json.dumps(body, indent=1, ensure_ascii=False).encode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(write(options.folder, options.layers, options.seed))

"""Networks for one budget: the searched one of a run, one that a person would pick, a depthwise CNN; built, compared, scored.

Accuracies are on the run's test split. An engine's are computed from its bytes on this computer, which are compared with those of QEMU and
of the NumPy interpreter on as many images as asked for.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mcu_rivals
import numpy as np
import numpy.typing as npt
import torch

from microcontroller import projects
from nascompile import build, data, pipeline, programs, targets
from nascompile.data import Split
from nascompile.errors import BudgetError
from nascompile.finetune import TrainingLog
from nascompile.mcu import calibrated, convolutional, torch_forward, transformer
from nascompile.mcu.program import Program
from nascompile.progress import Silent
from nascompile.records import Choice, EngineManifest, digest, file_digest, load
from nascompile.settings import Recipe

DEVICES = {"320k": "stm32f746", "64k": "m7_64k"}
"""Budget ▸ device whose RAM and flash it is: 320 KB and 1 MB, 64 KB and 256 KB."""
KINDS = ("searched", "hand", "cnn")
"""What a run has chosen, and what nobody searched for; what it has built besides is called `front-N`."""
SHARES = (1.0, 0.9999, 0.999)
"""Of a tensor's calibration values that its range covers at each end: the best on validation is taken."""
CALIBRATION_BATCH, VALIDATION = 32, 1000
"""Images at a time, and those that ranges are compared on."""
Classes = npt.NDArray[np.int64]


class Missing(Exception):
    """Something that a network is made of is not there, and how it is made."""


@dataclass(frozen=True)
class Network:
    """A network before it is built: how its program is made, and what it says in float."""

    name: str
    sizes: str
    program: Callable[[Split, Split], tuple[Program, str]]
    """(calibration, validation) ▸ program, how ranges were found."""
    classes: Callable[[npt.NDArray[Any]], Classes]
    """Of stored pixels, in FP32."""
    depends: tuple[Any, ...]
    facts: Mapping[str, Any]
    engine: Path | None = None
    """The folder that a run made of it."""


def kinds(budget: str, runs: Path) -> tuple[str, ...]:
    """Of the networks of a budget, those of the front that were built by number among them."""
    named = [folder.name.removeprefix("front-") for folder in (runs / f"searched-{budget}" / "engines").glob("front-*")]
    return (*KINDS, *(f"front-{number}" for number in sorted(int(name) for name in named if name.isdecimal())))


def found(kind: str, budget: str, runs: Path, jobs: int) -> Network:
    """Missing where its files are not there."""
    name = f"{kind}-{budget}"
    if kind not in ("hand", "cnn"):
        return _searched(name, runs / f"searched-{budget}", budget, "" if kind == "searched" else kind)
    path = runs / f"{name}.safetensors"
    if not path.is_file():
        raise Missing(f"{path}: python tools/benchmarks/mcu_rivals.py --data {runs}/searched-{budget}/data --out {runs} --only {name}")
    return _rival(name, path, data_folder(budget, runs), budget, jobs)


def data_folder(budget: str, runs: Path) -> Path:
    """Of the budget's run; Missing where there is none."""
    folder = runs / f"searched-{budget}"
    if not (folder / "choice.json").is_file():
        device = DEVICES[budget]
        raise Missing(f"{folder}: `nascompile run --model mcu_vit --device {device} --out {folder}`, in tools/benchmarks, to its end")
    return folder / "data"


# ---------------------------------------------------------------------------------------------- what networks are made of


def _rival(name: str, path: Path, folder: Path, budget: str, jobs: int) -> Network:
    samples, trained = mcu_rivals.Samples.of_folder(folder), mcu_rivals.facts(path)
    if trained["data"] != samples.digest:
        raise Missing(f"{path} was trained on other data than that of {folder}: train it again with --data {folder}")
    settings = data.open_split(folder, "calibration", "ranges of a rival").preprocessor.settings
    byte = 255 * settings.rescale  # of a pixel from 0 to 1, of which mean and deviation are
    mean, deviation = (tuple(value / byte for value in values) for values in (settings.mean, settings.std))
    rival = mcu_rivals.RIVALS[name]
    own, module = mcu_rivals.network(rival, path, samples, mean, deviation)
    facts = {
        "parameters": sum(value.numel() for value in module.parameters()), "epochs": trained["settings"]["epochs"],
        "quantization_aware_epochs": trained["settings"]["aware_epochs"],
    }  # fmt: skip
    program = partial(_calibrated, own, projects.board_of(DEVICES[budget]), jobs)
    return Network(name, rival.text, program, partial(mcu_rivals.predicted, module, samples), (file_digest(path), trained["data"]), facts)


def _searched(name: str, run: Path, budget: str, engine: str) -> Network:
    data_folder(budget, run.parent)
    with _known(DEVICES[budget]):
        return _of_run(name, run.resolve(), DEVICES[budget], engine)


@contextlib.contextmanager
def _known(device: str) -> Iterator[None]:
    """Where the device has a profile: the working folder, whose paths a run's recipe may name, or else the benchmark's own."""
    with contextlib.nullcontext() if device in targets.names() else contextlib.chdir(projects.PROFILES.parent):
        yield


def _of_run(name: str, run: Path, device: str, chosen: str) -> Network:
    """Of an engine by its name, or that which the run has chosen."""
    context = pipeline.Context(load(run / "recipe.json", Recipe), run, Silent(), pipeline.Given())
    engine = run / "engines" / (chosen or load(run / "choice.json", Choice).engine)
    manifest = load(engine / "manifest.json", EngineManifest)
    source = context.source_of(manifest)
    assert manifest.candidate is not None
    own = source.evaluator.network(manifest.candidate)

    def program(calibration: Split, validation: Split) -> tuple[Program, str]:
        assert manifest.candidate is not None
        with _known(device):
            lowered: Program = build.lower(context.parts, source, manifest.candidate)
        return lowered, context.method

    places = (context.model_folder, run / "teacher", run / "supernet", context.folder_of(context.built_from(manifest)))
    logs = [place / "training.json" for place in dict.fromkeys(places)]
    trained = [load(path, TrainingLog) for path in logs if path.is_file()]
    facts = {
        "parameters": manifest.parameters, "epochs": sum(log.epochs for log in trained),
        "quantization_aware_epochs": sum(log.epochs - log.quantized_from for log in trained if log.quantized_from is not None),
        "engine": engine.name,
    }  # fmt: skip
    depends = (digest(manifest), context.manifest.digest)
    classes = partial(_float, own, context.parts.preprocessor.scaling())
    return Network(name, sizes_of(own.shape), program, classes, depends, facts, engine)


def sizes_of(shape: transformer.Shape) -> str:
    """In words: `32 x 32, patch 4, width 96, 3 layers, heads 3 3 2, hidden 192 160 192, rank 0 0 32`."""
    rows = {name: [getattr(layer, name) for layer in shape.layers] for name in ("heads", "hidden", "rank")}
    lists = ", ".join(f"{name} {' '.join(map(str, values))}" for name, values in rows.items() if any(values))
    return f"{shape.image[0]} x {shape.image[1]}, patch {shape.patch}, width {shape.width}, {len(shape.layers)} layers, {lists}"


@torch.no_grad()
def _float(own: calibrated.Network, scaling: tuple[Any, Any], pixels: npt.NDArray[Any]) -> Classes:
    """Classes of stored pixels by the float network."""
    parameters = {name: torch.from_numpy(np.ascontiguousarray(value, np.float32)) for name, value in own.parameters.items()}
    factor, summand = map(torch.from_numpy, scaling)
    found = []
    for part in torch.from_numpy(np.ascontiguousarray(pixels)).split(mcu_rivals.TEST_BATCH):
        images = torch_forward.pooled(own.shape, part * factor + summand)
        found.append(torch_forward.forward(own.shape, parameters, images, own.epsilon, own.activation).argmax(1).numpy())
    return np.concatenate(found)


# ---------------------------------------------------------------------------------------------- ranges of rivals


def _calibrated(
    own: calibrated.Network | convolutional.Network, board: Any, jobs: int, calibration: Split, validation: Split
) -> tuple[Program, str]:
    """The program whose ranges are best on validation, by its own bytes."""
    sample = next(iter(_batches(calibration, 1)))[0]
    tried = []
    for share in SHARES:
        ranges = observe(own, _batches(calibration, CALIBRATION_BATCH), share)
        program = lower(own, ranges, board, sample)
        with tempfile.TemporaryDirectory() as folder:
            made = projects.build(program, board, Path(folder), here_only=True)
            right = score(made, validation.take(np.arange(min(VALIDATION, len(validation)))), jobs)
        tried.append((right, -len(tried), program, f"{100 * share:g} % of values"))
    best = max(tried, key=lambda one: one[:2])
    return best[2], best[3]


def observe(own: calibrated.Network | convolutional.Network, batches: Iterator[npt.NDArray[Any]], share: float) -> calibrated.Ranges:
    """Means over batches of the values that a share of a tensor's values is not beyond, at each end; of all of them: the extremes."""
    module: Any = convolutional if isinstance(own, convolutional.Network) else calibrated
    if share == 1.0:
        ranges: calibrated.Ranges = module.observe(own, batches)
        return ranges
    seen: dict[str, list[tuple[float, float]]] = {}

    def see(name: str, x: npt.NDArray[Any]) -> None:
        low, high = np.quantile(x, (1 - share, share))
        seen.setdefault(name, []).append((min(0.0, float(low)), max(0.0, float(high))))

    for images in batches:
        module.forward(own, images, see)
    means = {name: np.mean(pairs, 0).tolist() for name, pairs in seen.items()}
    return {name: (low, high) for name, (low, high) in means.items()}


def lower(own: calibrated.Network | convolutional.Network, ranges: calibrated.Ranges, board: Any, sample: npt.NDArray[Any]) -> Program:
    """For a board: a transformer's fastest fusion that fits."""
    if isinstance(own, convolutional.Network):
        return convolutional.lower(own, ranges, sample)
    return transformer.fitting(lambda fusion: programs.lower(own, ranges, fusion, sample), board)[0]


def _batches(split: Split, size: int) -> Iterator[npt.NDArray[Any]]:
    for inputs, _ in split.batches(size):
        yield np.asarray(inputs["pixel_values"], np.float64)


def score(made: projects.Project, split: Split, jobs: int) -> float:
    """Per cent of a split that the build for this computer gets right."""
    pixels = made.program.structure.pixels.quantize(split.arrays()["pixel_values"])
    return _right(projects.hosted(made, pixels, jobs), split.labels)


def _right(outputs: npt.NDArray[np.uint8], labels: Sequence[int]) -> float:
    return 100 * float((projects.scores(outputs).argmax(1) == np.asarray(labels)).mean())


# ---------------------------------------------------------------------------------------------- measuring


def measure(net: Network, folder: Path, budget: str, images: int, jobs: int) -> dict[str, Any]:
    """A row: accuracies, memory by the linker, instructions of `images` test images; `folder`: the data of the budget's run."""
    calibration, validation = (data.open_split(folder, name, f"the program of {net.name}") for name in ("calibration", "validation"))
    test = data.open_split(folder, "test", f"scores of {net.name}")
    board = projects.board_of(DEVICES[budget])
    program, ranges = net.program(calibration, validation)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            made = projects.build(program, board, Path(scratch))
        except BudgetError as error:
            raise SystemExit(f"error: {net.name} does not fit its budget: {error.message}") from error
        same = None if net.engine is None else all(
            (net.engine / name).read_bytes() == (Path(scratch) / name).read_bytes() for name in ("model.c", "weights.c")
        )  # fmt: skip
        pixels = program.structure.pixels.quantize(test.arrays()["pixel_values"])
        outputs, facts = projects.compared(made, pixels, min(images, len(pixels)), jobs)
    fp32 = 100 * float((net.classes(test.inputs["pixel_values"]) == test.labels).mean())
    engine = _right(outputs, test.labels)
    return {
        "network": net.name.removesuffix(f"-{budget}"), "budget": budget, "sizes": net.sizes, **net.facts, "calibration": ranges,
        "accuracy_fp32": fp32, "accuracy_engine": engine, "test_images": len(test), **facts,
        **({} if same is None else {"files_equal_to_the_engine_of_the_run": same}),
    }  # fmt: skip

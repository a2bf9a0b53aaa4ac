"""What candidates for microcontrollers are scored as is what their programs give."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import ViTConfig

import nascompile
from nascompile import network, plugins, program_accuracy, space as spaces, targets
from nascompile.data import Split
from nascompile.mcu import calibrated, interpreter
from nascompile.preprocess import Preprocessing, Preprocessor
from nascompile.program_accuracy import ProgramEvaluator, by_tensor, emulate
from nascompile.records import INT8
from nascompile.supernet import Supernet, load_batches

MEAN, DEVIATION = (0.3, 0.5, 0.4), (0.2, 0.3, 0.25)
CONFIG = ViTConfig(
    hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=40, num_labels=4, image_size=12, patch_size=4,
    num_channels=3,
)  # fmt: skip


def split_of(name: str, count: int, seed: int) -> Split:
    """Noise with a bright square whose corner is the class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, count)
    pixels = rng.integers(0, 140, (count, 3, 12, 12))
    for image, label in zip(pixels, labels, strict=True):
        row, column = 6 * (label // 2), 6 * (label % 2)
        image[:, row : row + 6, column : column + 6] += 80
    settings = Preprocessing(modality="image", inputs=("pixel_values",), resize=(12, 12), mean=MEAN, std=DEVIATION)
    inputs = {"pixel_values": pixels.astype(np.uint8)}
    return Split(name, inputs, labels, np.zeros((count, 32), np.uint8), f"{name} {seed}", Preprocessor(settings, {}))


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A network that was trained a little, its space, and an evaluator."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    family, backend = plugins.get("families", "vit"), plugins.get("backends", "mcu_c")
    target = targets.make("stm32f746", "", family.workload(CONFIG, 1, 0))
    net = Supernet(family, family.create(CONFIG))
    space = network.search_space(family, CONFIG, backend, target, "m")
    train = load_batches(split_of("train", 512, 1), np.arange(512), 64)
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    for _ in range(6):
        for inputs, labels in train:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(inputs, net.largest()), labels).backward()
            optimizer.step()
    net.eval()
    folder = tmp_path_factory.mktemp("weights")
    (folder / "model.safetensors").write_bytes(b"weights")
    splits = split_of("calibration", 96, 2), split_of("validation", 128, 3)

    def evaluator(method: str = "minmax") -> ProgramEvaluator:
        task = plugins.get("tasks", "classification")
        return ProgramEvaluator(net, folder, space, task, "accuracy", *splits, method, 64, 0, 0, target)

    return SimpleNamespace(net=net, space=space, evaluator=evaluator, splits=splits, target=target, family=family)


def test_a_space_of_integers_alone(case):
    assert case.space.precisions == (INT8,)
    whole = spaces.largest(case.space)
    assert whole == spaces.uniform(case.space)
    graph = network.graph(case.family, CONFIG, case.space, whole, case.target)
    assert {node.operator.precision for node in graph.nodes} == {INT8}
    assert spaces.of_targets(case.space, (0,)) == case.space, "the same for one of its one targets"


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
def test_scores_are_those_of_the_programs(case, method):
    """The largest candidate and a random one: classes of nearly all samples, and logits within a fraction of what tells classes apart."""
    evaluator, validation = case.evaluator(method), case.splits[1]
    images = validation.arrays()["pixel_values"]
    assert evaluator.reference().value > 80
    for point in (spaces.largest(case.space), spaces.sample(case.space, np.random.default_rng(4))):
        ranges = evaluator.ranges(point)
        program = evaluator.program(point, ranges, images[0])
        own = np.stack([interpreter.run(program, x) for x in program.structure.pixels.quantize(images)]) * program.structure.logits.scale
        with torch.inference_mode():
            emulated, labels = emulate(evaluator.network(point), by_tensor(ranges), evaluator.validation)
        assert (labels == validation.labels).all()
        assert (own.argmax(1) == emulated.argmax(1)).mean() >= 0.97
        floats = calibrated.forward(evaluator.network(point), images)
        noise = {name: ((found - floats) ** 2).mean() for name, found in (("program", own), ("emulated", emulated))}
        assert ((own - emulated) ** 2).mean() < 0.3 * noise["program"], "it is the program's own error that is emulated"
        score = evaluator.score(point)
        assert score.value == pytest.approx(100 * (emulated.argmax(1) == validation.labels).mean())
        assert score.n == len(validation)


def test_the_reference_is_the_float_network(case):
    evaluator, other = case.evaluator(), split_of("test", 50, 9)
    with torch.no_grad():
        logits = case.net({"pixel_values": torch.from_numpy(other.arrays()["pixel_values"])}, case.net.largest()).numpy()
    found = evaluator.reference(other)
    assert found.value == pytest.approx(100 * (logits.argmax(1) == other.labels).mean())
    assert (found.n, found.split_digest) == (50, other.digest)
    assert found.evaluator_digest != evaluator.digest
    whole = spaces.largest(case.space)
    assert evaluator.score(whole, other).n == 50


def test_clipping_cuts_ranges(case):
    point = spaces.largest(case.space)
    widths = {method: sum(high - low for _, low, high in case.evaluator(method).ranges(point).sites) for method in ("minmax", "percentile")}
    assert widths["percentile"] < widths["minmax"]
    seen = by_tensor(case.evaluator().ranges(point))
    assert {"tokens", "layers.2.mixed", "layers.0.v1", "features"} <= set(seen)


def test_scores_depend_on_the_code_that_makes_them():
    package = Path(nascompile.__file__).parent
    covered = {path.relative_to(package).as_posix() for path in program_accuracy.sources()}
    assert {
        "program_accuracy.py", "programs.py", "supernet.py", "mcu/calibrated.py", "mcu/torch_forward.py", "mcu/transformer.py",
        "mcu/constants.py", "mcu/program.py", "families/vit.py", "families/mcu_vit.py", "quantization/int8.py",
    } <= covered  # fmt: skip
    assert all(path.is_file() for path in program_accuracy.sources())


def test_a_digest_changes_with_any_of_the_files(monkeypatch, tmp_path):
    before = program_accuracy.arithmetic.__wrapped__()
    own = tmp_path / "calibrated.py"
    own.write_bytes(next(path for path in program_accuracy.sources() if path.name == "calibrated.py").read_bytes() + b"\n")
    replaced = [own if path.name == "calibrated.py" else path for path in program_accuracy.sources()]
    monkeypatch.setattr(program_accuracy, "sources", lambda: replaced)
    assert program_accuracy.arithmetic.__wrapped__() != before

"""Quantization-aware epochs of networks that become programs: their very grids, gradients, ranges, and what programs gain."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from test_finetune import TASK
from test_mcu_vit import FAMILY, Backend, Case

from nascompile import finetune, network, plugins, programs, space as spaces
from nascompile.data import Split
from nascompile.families.mcu_vit import McuVitConfig
from nascompile.mcu import calibrated, interpreter
from nascompile.preprocess import Preprocessing, Preprocessor
from nascompile.progress import Silent
from nascompile.quantization_aware import IN_SUMS, ProgramQuantizer, Quantized, first_ranges, quantizer
from nascompile.records import Target
from nascompile.settings import FinetuneSettings
from nascompile.supernet import Supernet

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def case():
    return Case()


def decibels(found: np.ndarray, want: np.ndarray) -> float:
    return 10 * np.log10((want**2).sum() / ((found - want) ** 2).sum())


class Seen:
    """A quantizer, and what it makes of every tensor."""

    def __init__(self, quantizer: ProgramQuantizer) -> None:
        self.quantizer, self.rows = quantizer, quantizer.rows
        self.tensors: dict[str, np.ndarray] = {}

    def __call__(self, *product):
        return self.quantizer(*product)

    def see(self, name, x):
        found = self.quantizer.see(name, x)
        self.tensors[name] = (found.transpose(1, 2) if name.endswith(".q") else found).flatten(1).numpy()
        return found


@pytest.mark.parametrize("genes", [{}, {"rank": 8, "depth": 2}, {"patch": 8, "heads": 1}])
def test_every_tensor_is_as_noisy_as_in_the_program(case, genes):
    """Small errors grow on their way in another way in each, so what follows the first block has noise of the same power, not the same."""
    point = case.point(**genes)
    net, subnet = case.network(point), case.net.subnet(case.space, point)
    ranges = calibrated.observe(net, [case.images])
    program, numbers = programs.lower(net, ranges, "blocks"), calibrated.CalibratedNumbers(net, ranges)
    traces = [interpreter.trace(program, image) for image in program.structure.pixels.quantize(case.images)]
    seen = Seen(ProgramQuantizer(of_layers(ranges, subnet.layers)))
    seen.quantizer.layers = subnet.layers
    exact: dict[str, np.ndarray] = {}
    calibrated.forward(net, case.images, lambda name, x: exact.setdefault(name, x.swapaxes(1, 2) if name.endswith(".q") else x))
    with torch.no_grad():
        case.net({"pixel_values": torch.from_numpy(case.images)}, subnet, seen)
    compared = [name for name in traces[0] if name in seen.tensors]
    assert {"tokens", "layers.0.normalized", "layers.0.q", "layers.0.mixed", "layers.1.out", "features"} <= set(compared)
    for name in compared:
        grid = numbers.grid(name)
        integers = np.stack([(trace[name].astype(float) - grid.zero).ravel() * grid.scale for trace in traces])
        emulated, true = seen.tensors[name], exact[name].reshape(len(traces), -1)
        assert abs(decibels(emulated, true) - decibels(integers, true)) < 3, name
        if name in ("tokens", "layers.0.normalized", "layers.0.q"):  # rounded alike, but for few: float alone is a quarter of a step off
            assert np.abs(emulated - integers).mean() < 0.6 * np.abs(true - integers).mean(), name


def of_layers(ranges, layers: tuple[int, ...]) -> dict[str, tuple[float, float]]:
    """Ranges of a sub-network's tensors by the layers of the largest network."""
    found = {}
    for name, value in ranges.items():
        _, _, rest = name.partition("layers.")
        number, _, part = rest.partition(".")
        found[f"layers.{layers[int(number)]}.{part}" if rest else name] = value
    return found


def test_gradients_reach_every_parameter_that_a_network_has(case):
    own = Case()
    inputs = {"pixel_values": torch.from_numpy(own.images)}
    ranges = first_ranges(own.net, own.space, [(inputs, torch.zeros(len(own.images)))])
    assert {"tokens", "layers.0.q", "layers.2.v1", "layers.1.normalized2", "features"} <= set(ranges)
    aware = Quantized(own.net, quantizer(own.net, own.space, ranges))
    assert isinstance(aware.quantizer, ProgramQuantizer)
    subnet = own.net.subnet(own.space, own.point(depth=2, rank=8, patch=8, image=8))
    aware(inputs, subnet).square().sum().backward()
    reached = {name for name, p in own.model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    kept = [f"layers.{i}." for i in subnet.layers]
    wanted = {
        name for name in own.weights
        if not name.startswith(("layers.", "embeddings.pairs.")) or name.startswith((*kept, "embeddings.pairs.8_8."))
    }  # fmt: skip
    assert {name for name in wanted if "key.second.bias" not in name} <= reached <= wanted, "a key's bias cancels, but for rounding"
    assert subnet.layers == (0, 2)
    before = dict(aware.quantizer.ranges)
    aware.quantizer.follow()
    moved = {name for name, value in aware.quantizer.ranges.items() if before.get(name) != value}
    assert {"layers.0.q", "layers.2.q", "layers.2.up.middle", "tokens"} <= moved, "of the layers of the largest network"
    assert not any(name.startswith("layers.1.") for name in moved)
    assert not any(name.endswith(tuple(f".{part}" for part in IN_SUMS)) for name in moved)


def test_ranges_stay_as_they_are_where_nothing_is_trained(case):
    quantized = ProgramQuantizer({"tokens": (-1.0, 2.0)})
    x = torch.tensor([[-3.0, 0.01, 5.0]], requires_grad=True)
    with torch.no_grad():
        found = quantized.see("tokens", x)
    quantized.follow()
    assert quantized.ranges == {"tokens": (-1.0, 2.0)}
    grid = calibrated.Grid.covering(-1.0, 2.0)
    np.testing.assert_allclose(found, (grid.bytes(x.detach().numpy()).astype(int) - grid.zero) * grid.scale, atol=1e-6)
    quantized.see("tokens", x).sum().backward()
    assert x.grad.tolist() == [[0.0, 1.0, 0.0]], "none beyond the range"
    quantized.follow()
    assert quantized.ranges["tokens"] == pytest.approx((0.9 * -1 + 0.1 * -3, 0.9 * 2 + 0.1 * 5))


# ---------------------------------------------------------------------------------------------- what programs gain


SIDE, KINDS = 8, 4
MEAN, DEVIATION = (0.5,), (0.25,)


def pictures(samples: int, seed: int) -> Split:
    """Bytes: stripes of a kind each, under noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(KINDS, size=samples)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    kinds = np.stack([(rows // 2) % 2, (columns // 2) % 2, ((rows + columns) // 2) % 2, ((rows - columns) // 2) % 2])
    pixels = 128 + 40 * (kinds[labels] - 0.5) + 45 * rng.standard_normal((samples, SIDE, SIDE))
    preprocessor = Preprocessor(
        Preprocessing(modality="image", inputs=("pixel_values",), channels=1, resize=(SIDE, SIDE), mean=MEAN, std=DEVIATION), {}
    )
    stored = {"pixel_values": np.clip(pixels, 0, 255).astype(np.uint8)[:, None]}
    return Split(f"s{seed}", stored, labels.astype(np.int64), np.zeros((samples, 32), np.uint8), f"digest-{seed}", preprocessor)


def job_of(folder, net: Supernet, space, recipe: str, epochs: int, rate: float, aware: int = 0) -> finetune.Job:
    settings = FinetuneSettings(batch_size=32, learning_rate=rate, supernet_learning_rate=rate, patience=100, weight_decay=0.0)
    chosen = plugins.get("recipes", recipe)
    folder.mkdir()
    return finetune.Job(
        net=net, space=space, recipe=chosen, terms=finetune.terms_of(TASK, chosen, settings), settings=settings, train=pictures(512, 1),
        validation=pictures(256, 2), metric="accuracy", epochs=epochs, folder=folder, seed=1, aware_epochs=aware, keep_best=False,
    )  # fmt: skip


@torch.no_grad()
def make_uneven(net: Supernet) -> None:
    """One channel of every head's values, and one of what every MLP reads, larger than the others, and less of it read: the same function,
    but bytes hold little of the others."""
    for block in net.model.layers:
        for channel in (0, 8):
            block.attention.value.second.weight[channel] *= UNEVEN
            block.attention.value.second.bias[channel] *= UNEVEN
            block.attention.out.first.weight[:, channel] /= UNEVEN
        block.mlp.norm.weight[3] *= UNEVEN
        block.mlp.norm.bias[3] *= UNEVEN
        block.mlp.up.first.weight[:, 3] /= UNEVEN


UNEVEN = 140.0


def program_loss(job: finetune.Job, target: Target, point) -> float:
    """Cross-entropy of a candidate's integer program on validation."""
    weights = {name: p.detach().numpy() for name, p in job.net.model.named_parameters()}
    net = programs.network_of(FAMILY, job.net.config, job.space, point, target, weights, MEAN, DEVIATION)
    program = programs.lower(net, calibrated.observe(net, [job.train.arrays()["pixel_values"][:128]]), "blocks")
    images = program.structure.pixels.quantize(job.validation.arrays()["pixel_values"])
    logits = np.stack([interpreter.run(program, image) for image in images]) * program.structure.logits.scale
    return float(torch.nn.functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(job.validation.labels)))


def test_programs_lose_less_after_it(tmp_path):
    config = McuVitConfig(
        image_size=SIDE, patch_sizes=(4,), num_channels=1, hidden_size=16, hidden_sizes=(16,), num_hidden_layers=2, depths=(1, 2),
        num_attention_heads=2, head_dim=8, intermediate_size=32, widths=(32,), ranks=(4, 16), num_labels=KINDS,
    )  # fmt: skip
    torch.manual_seed(0)
    net = Supernet(FAMILY, FAMILY.create(config))
    target = Target(device="d", backend="made-up", workload=FAMILY.workload(config, 1, 0))
    space = network.search_space(FAMILY, config, Backend(), target, "m", (0, 1), ("int8",))
    finetune.train(job_of(tmp_path / "float", net, space, "bignas", 8, 1e-2), Silent())
    make_uneven(net)
    points = [spaces.uniform(space), *(spaces.quantized(space, spaces.sample(space, np.random.default_rng(i))) for i in range(3))]
    found = {}
    for aware in (0, 6):
        job = job_of(tmp_path / str(aware), copy.deepcopy(net), space, "bignas", 6, 2e-3, aware)
        finetune.train(job, Silent())
        found[aware] = float(np.mean([program_loss(job, target, point) for point in points]))
    assert found[6] < 0.8 * found[0]


def test_factors_are_settled_between_teacher_and_super_network(tmp_path):
    """The teacher's function, and prefixes of each map's factors that no other factors of that rank are nearer with."""
    torch.manual_seed(0)
    config = McuVitConfig(
        image_size=SIDE, patch_sizes=(4,), num_channels=1, hidden_size=16, hidden_sizes=(16,), num_hidden_layers=2, depths=(1, 2),
        num_attention_heads=2, head_dim=8, intermediate_size=32, widths=(32,), ranks=(4, 16), num_labels=2,
    )  # fmt: skip
    finetune.store_model(Supernet(FAMILY, FAMILY.create(config)), tmp_path / "model", {})
    target = Target(device="d", backend="made-up", workload=FAMILY.workload(config, 1, 0))
    plan = finetune.Plan(
        family=FAMILY, model=tmp_path / "model", head={"num_labels": KINDS},
        space_of=lambda config, order: network.search_space(FAMILY, config, Backend(), target, "m", order, ("int8",)),
        train=pictures(96, 1), validation=pictures(64, 2), task=TASK, metric="accuracy",
        settings=FinetuneSettings(recipe="bignas", teacher_epochs=3, epochs=0, batch_size=16, learning_rate=2e-2), seed=1, out=tmp_path,
    )  # fmt: skip
    space = finetune.finetune(plan, Silent())
    teacher, net = (Supernet(FAMILY, FAMILY.load(str(tmp_path / name))) for name in ("teacher", "supernet"))
    inputs = {"pixel_values": torch.from_numpy(plan.validation.arrays()["pixel_values"])}
    with torch.no_grad():
        np.testing.assert_allclose(net(inputs, net.largest()), teacher(inputs, teacher.largest()), atol=1e-4)
    assert set(space.layer_order) == {0, 1}

    def excess(model) -> float:
        """Squared error of prefixes of rank 4 over that of the best, less one; over all maps."""
        found, least = 0.0, 0.0
        for segment in FAMILY.segments(config):
            for name in segment.quantizable[::2]:
                first, second = (model.get_parameter(name.replace(".first.", f".{factor}.")).detach() for factor in ("first", "second"))
                found += float((second[:, 4:] @ first[4:]).square().sum())
                least += float(torch.linalg.svdvals(second @ first)[4:].square().sum())
        return found / least - 1

    assert excess(net.model) < 1e-3
    assert excess(teacher.model) > 0.02, "training has moved them"

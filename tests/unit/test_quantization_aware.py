"""Quantization-aware epochs: the arithmetic of scoring, gradients straight through it, ranges that follow, and what children get of it."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch
from test_finetune import Album, Scripted, make_job, same, weights

from nascompile import finetune, plugins, space as spaces
from nascompile.errors import RecipeError
from nascompile.progress import Silent
from nascompile.quantization import ActivationRanges, dequantize
from nascompile.quantization_aware import TrainingQuantizer
from nascompile.records import FLOAT32
from nascompile.supernet import Supernet, emulate, load_batches, on_grid

torch.set_num_threads(1)


def test_the_last_epochs_compute_as_scoring_does(tmp_path, monkeypatch):
    """The very logits of `supernet.emulate`, with the ranges of the moment, for every network of a step."""
    job, compared = make_job(tmp_path / "run", "vit", recipe="bignas", aware=1), 0
    real = job.recipe.losses

    def losses(net, space, batch, rng, terms):
        nonlocal compared
        if not isinstance(net, Supernet):
            assert epochs_done() >= 1
            sites = tuple((name, *net.quantizer.ranges[name]) for name in sorted(net.quantizer.ranges))
            ranges, target = ActivationRanges(method="minmax", sites=sites), space.targets[0]
            for architecture in (spaces.largest(space), spaces.smallest(space), spaces.sample(space, np.random.default_rng(compared))):
                point = spaces.quantized(space, architecture)
                want = emulate(net.net, space, point, target, [(batch.inputs, batch.labels)], ranges)[0]
                net.eval()
                with torch.no_grad():
                    got = net(batch.inputs, net.subnet(space, point)).numpy()
                np.testing.assert_array_equal(got, want)
                compared += 1
            net.net.train()
        yield from real(net, space, batch, rng, terms)

    class Recipe:
        def __getattr__(self, name):
            return getattr(job.recipe, name)

    recipe = Recipe()
    recipe.losses = losses
    steps = []

    class Count(Silent):
        def step(self, label, done, total):
            steps.append(done)

    def epochs_done():
        return len(steps) / 4

    log = finetune.train(replace(job, recipe=recipe), Count())
    assert compared == 4 * 3  # the steps of the second epoch alone
    assert (log.quantized_from, len(steps)) == (1.0, 8)


def test_gradients_go_straight_through_the_grids():
    """Inside the range the gradient of a quantized product is that of the float one at the rounded numbers; outside it is zero."""
    rng = np.random.default_rng(0)
    x = torch.tensor(rng.standard_normal((5, 8)), dtype=torch.float32, requires_grad=True)
    w = torch.tensor(rng.standard_normal((3, 8)), dtype=torch.float32, requires_grad=True)
    quantizer = TrainingQuantizer({"w": "int8"}, {"w": (-1.0, 1.5)})
    out = quantizer("w", x, w, None)
    out.sum().backward()
    scheme = plugins.get("quantization", "int8")
    integers, scale = scheme.quantize_weight(w.detach().numpy())
    weight = integers * scale[:, None]
    step, zero = scheme.activation_parameters(-1.0, 1.5)
    levels = np.clip(np.rint(x.detach().numpy() / step) + zero, 0, 255)
    inputs = (levels - zero) * step
    np.testing.assert_allclose(out.detach(), inputs @ weight.T, rtol=0, atol=1e-5)  # float32 sums of 8 terms
    np.testing.assert_allclose(w.grad, np.tile(inputs.sum(0), (3, 1)), rtol=0, atol=1e-5)
    inside = (np.rint(x.detach().numpy() / step) + zero >= 0) & (np.rint(x.detach().numpy() / step) + zero <= 255)
    assert 0 < inside.sum() < inside.size
    np.testing.assert_allclose(x.grad, np.where(inside, weight.sum(0), 0), rtol=0, atol=1e-5)


def test_ranges_follow_what_was_seen():
    quantizer = TrainingQuantizer({"a": "int8", "b": "int8"}, {"a": (-1.0, 1.0), "b": (0.0, 2.0)})
    weight = torch.ones(2, 2)
    quantizer("a", torch.tensor([[-3.0, 0.5]]), weight, None)
    quantizer("a", torch.tensor([[-1.0, 2.0]]), weight, None)
    with torch.no_grad():
        quantizer("b", torch.tensor([[-9.0, 9.0]]), weight, None)  # validation is not training
    quantizer.follow()
    assert quantizer.ranges["a"] == pytest.approx((0.9 * -1 + 0.1 * -3, 0.9 * 1 + 0.1 * 2))
    assert quantizer.ranges["b"] == (0.0, 2.0)
    quantizer("b", torch.tensor([[1.0, 4.0]]), weight, None)
    quantizer.follow()
    assert quantizer.ranges["b"] == pytest.approx((0.0, 0.9 * 2 + 0.1 * 4))  # zero stays in the range


def test_looked_up_rows_are_those_of_the_quantized_table():
    table = torch.tensor(np.random.default_rng(0).standard_normal((7, 40)), dtype=torch.float32, requires_grad=True)
    ids = torch.tensor([[0, 3], [3, 6]])
    for scheme in ("weight-int8", "weight-int4-block32"):
        table.grad = None
        out = TrainingQuantizer({"t": scheme}, {})("t", ids, table, None)
        integers, scale = plugins.get("quantization", scheme).quantize_weight(table.detach().numpy())
        want = dequantize(integers, scale, 32)
        np.testing.assert_array_equal(out.detach(), want[ids.numpy()])
        out.sum().backward()
        np.testing.assert_array_equal(table.grad[:, 0], [1, 0, 0, 2, 0, 0, 1])


@pytest.mark.parametrize("scheme", plugins.names("quantization"))
def test_weights_are_on_numpys_grid_whatever_computes_it(scheme):
    found = plugins.get("quantization", scheme)
    rng = np.random.default_rng(0)
    for weight in (rng.standard_normal((5, 70)), np.zeros((2, 3)), rng.standard_normal((4, 128)) * 1e-30, rng.integers(-127, 128, (6, 33))):
        values = weight.astype(np.float32)
        integers, scale = found.quantize_weight(values)
        want = dequantize(integers, scale, found.precision.weights.group_size)
        np.testing.assert_array_equal(on_grid(found, torch.from_numpy(values)), want)

    class Other:
        precision = found.precision

        def quantize_weight(self, weight):
            return found.quantize_weight(weight + 1)

    integers, scale = found.quantize_weight(values + 1)
    want = dequantize(integers, scale, found.precision.weights.group_size)
    np.testing.assert_array_equal(on_grid(Other(), torch.from_numpy(values)), want)


def test_children_inherit_it(tmp_path):
    """INT4 without zero points is too coarse for so small a network to be rounded to it: trained with it, it fits the data far better."""
    lost = {}
    for aware in (0, 5):
        job = make_job(tmp_path / str(aware), recipe="instatune", epochs=10, aware=aware)
        coarse = tuple(
            msgspec.structs.replace(g, choices=("fp32", "weight-int4-block32")) if g.kind == "precision" else g for g in job.space.genes
        )
        names = ("fp32", "weight-int4-block32")
        precisions = (FLOAT32, plugins.get("quantization", names[1]).precision)
        job = replace(job, space=msgspec.structs.replace(job.space, genes=coarse, precisions=precisions))
        with torch.no_grad():
            for parameter in job.net.model.blocks.parameters():
                parameter.mul_(20 if parameter.ndim > 1 else 1)  # blocks that matter: they begin with weights of 0.02
        finetune.train(job, Silent())
        batches, target = load_batches(job.train, np.arange(len(job.train)), 8), job.space.targets[0]
        smallest = spaces.quantized(job.space, spaces.smallest(job.space))
        for name, point in (("largest", spaces.uniform(job.space)), ("smallest", smallest)):
            logits, labels = emulate(job.net, job.space, point, target, batches, None)
            lost[name, aware] = float(torch.nn.functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels)))
    assert lost["largest", 5] < 0.9 * lost["largest", 0]
    assert lost["smallest", 5] < lost["smallest", 0]


def test_the_best_is_one_of_the_quantization_aware_epochs(tmp_path):
    scores = [10, 90, 80, 20, 30, 40]  # start, two epochs in float; then quantized: at its start and after each of two epochs
    job = make_job(tmp_path / "run", recipe="plain", epochs=4, aware=2, task=Scripted(scores))
    album = Album(job.net)
    log = finetune.train(job, album)
    assert log.validation == ((0.0, 10.0), (1.0, 90.0), (2.0, 80.0), (2.0, 20.0), (3.0, 30.0), (4.0, 40.0))
    assert (log.best, log.best_epoch, log.quantized_from) == (40, 4, 2.0)
    assert same(weights(job.net), album.pictures[16])


def test_where_float_epochs_bring_nothing_more_the_quantization_aware_ones_come_next(tmp_path):
    scores = [10, 90, 80, 20, 30]  # no improvement after one epoch: on to the last epoch from the weights of the first
    job = make_job(tmp_path / "run", recipe="plain", epochs=9, aware=1, task=Scripted(scores), patience=1)
    album = Album(job.net)
    log = finetune.train(job, album)
    assert [epoch for epoch, _ in log.validation] == [0, 1, 2, 8, 9]
    assert (log.steps, log.epochs, log.stopped) == (12, 9, "finished")
    assert log.samples == 12 * 8
    assert (log.best, log.best_epoch) == (30, 9)


def test_a_space_without_integers_cannot_be_trained_for(tmp_path):
    job = make_job(tmp_path / "run", aware=1)
    genes = tuple(gene for gene in job.space.genes if gene.kind == "architecture")
    job = replace(job, space=msgspec.structs.replace(job.space, genes=genes))
    with pytest.raises(RecipeError, match="nothing for quantization-aware training to quantize"):
        finetune.train(job, Silent())

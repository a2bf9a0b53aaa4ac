"""What every recipe promises: as many losses as it says, each a graph of its own, the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nascompile import network, plugins
from nascompile.families.toy import ToyConfig
from nascompile.recipes import StepBatch, Terms
from nascompile.records import Target
from nascompile.supernet import Supernet

torch.set_num_threads(1)

RECIPES = plugins.names("recipes")
TASK = plugins.get("tasks", "classification")


class Backend:
    name, width_multiple = "made-up", 8

    def supports(self, precision) -> str:
        return ""


@pytest.fixture
def net():
    torch.manual_seed(0)
    family = plugins.get("families", "toy")
    return Supernet(family, family.create(ToyConfig(features=6, hidden=8, width=16, rank=4, layers=3, num_labels=3)))


def step(name, net, *, seed=0, subnets=1, class_weights=None, labels=(0, 1, 2, 0), teacher=True):
    """(losses, gradient per parameter) of one step."""
    recipe = plugins.get("recipes", name)
    target = Target(device="d", backend="made-up", workload=net.family.workload(net.config, 1, 0))
    space = network.search_space(net.family, net.config, Backend(), target, "m", (2, 0, 1))
    rng = np.random.default_rng(1)
    batch = StepBatch(
        {"features": torch.tensor(rng.standard_normal((4, 6)), dtype=torch.float32)}, torch.tensor(labels),
        torch.tensor(rng.standard_normal((4, 3)), dtype=torch.float32) if teacher else None,
    )  # fmt: skip
    net.zero_grad()
    losses = []
    net.train()
    for loss in recipe.losses(net, space, batch, np.random.default_rng(seed), Terms(TASK, class_weights, 0.3, 0.5, 2.0, subnets)):
        assert loss.ndim == 0
        loss.backward()  # before the next is asked for, as the trainer does
        losses.append(loss.item())
    return losses, {n: None if p.grad is None else p.grad.clone() for n, p in net.named_parameters()}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("subnets", [1, 3])
def test_there_are_as_many_losses_as_passes(name, subnets, net):
    recipe = plugins.get("recipes", name)
    losses, _ = step(name, net, subnets=subnets)
    assert recipe.name == name
    assert len(losses) == recipe.passes(Terms(TASK, None, 0.3, 0.5, 1.0, subnets))
    assert np.isfinite(losses).all()


@pytest.mark.parametrize("name", RECIPES)
def test_every_weight_learns(name, net):
    """In one step of a few: some recipes run one sub-network in each."""
    learnt = set()
    for seed in range(8):
        _, gradients = step(name, net, seed=seed)
        learnt |= {n for n, g in gradients.items() if g is not None and g.abs().sum() > 0}
    assert learnt == {n for n, _ in net.named_parameters()}


@pytest.mark.parametrize("name", RECIPES)
def test_a_step_depends_on_its_seed_and_on_nothing_before_it(name, net):
    first = step(name, net, seed=4, subnets=2)
    step(name, net, seed=5, subnets=2)
    torch.manual_seed(77)
    again = step(name, net, seed=4, subnets=2)
    assert again[0] == first[0]
    assert all(again[1][n] is None if g is None else torch.equal(again[1][n], g) for n, g in first[1].items())


@pytest.mark.parametrize("name", RECIPES)
def test_class_weights_reach_the_loss(name, net):
    plain, _ = step(name, net)
    weighed, _ = step(name, net, class_weights=torch.tensor([5.0, 0.1, 1.0]))
    changed = [a != pytest.approx(b) for a, b in zip(plain, weighed, strict=True)]
    assert changed[0]
    assert all(changed) or name == "bignas"  # whose others learn from the biggest alone


@pytest.mark.parametrize("name", [n for n in RECIPES if not plugins.get("recipes", n).distils])
def test_a_recipe_that_does_not_distil_needs_no_teacher(name, net):
    assert step(name, net, teacher=False)[0] == step(name, net)[0]


@pytest.mark.parametrize("name", RECIPES)
def test_the_learning_rate_starts_at_its_peak_and_never_rises(name):
    recipe, terms = plugins.get("recipes", name), Terms(TASK, None, 0.3, 1.0, 1.0, 1)
    rates = [recipe.rate(1 - done / 50, 5 * done / 50, terms) for done in range(51)]
    assert rates[0] == 1
    assert rates == sorted(rates, reverse=True)
    assert 0 <= rates[-1] <= terms.rate_floor


@pytest.mark.parametrize("name", RECIPES)
def test_sub_networks_are_trained_where_a_recipe_says_so(name, net):
    recipe, drawn, forward = plugins.get("recipes", name), [], net.forward
    net.forward = lambda inputs, subnet, *rest: drawn.append(subnet) or forward(inputs, subnet, *rest)
    for seed in range(4):
        step(name, net, seed=seed, subnets=recipe.random_subnets)
    others = [subnet for subnet in drawn if subnet != net.largest()]
    assert len(drawn) == 4 * recipe.passes(Terms(TASK, None, 0.3, 1.0, 1.0, recipe.random_subnets))
    assert bool(others) == recipe.elastic


@pytest.mark.parametrize("name", RECIPES)
def test_steps_lower_the_loss(name, net):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2)
    before = sum(step(name, net)[0])
    for _ in range(30):
        step(name, net)
        optimizer.step()
    assert sum(step(name, net)[0]) < before

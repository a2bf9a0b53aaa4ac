"""Passes that are captured and replayed: when that happens, on a CPU with made-up graphs, and on a GPU that nothing else comes out."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_augmentation import as_images
from test_finetune import make_job, make_net, make_space, weights
from torch.func import functional_call

from nascompile import finetune, replay, space as spaces
from nascompile.errors import RecipeError
from nascompile.progress import Silent


class Recomputed:
    """What stands for captured graphs where there is no GPU: a replay computes anew, of what the tensors hold then."""

    def __init__(self, net, name, x, subnet) -> None:
        self.x, self.net, self.name, self.subnet = x, net, name, subnet
        self.ahead, self.back = SimpleNamespace(replay=self.forth), SimpleNamespace(replay=self.and_back)

    def forth(self) -> None:
        self.leaves = [p.detach().requires_grad_() for p in self.net.parameters()]
        named = dict(zip((name for name, _ in self.net.named_parameters()), self.leaves, strict=True))
        with torch.enable_grad():
            self.own = functional_call(self.net, named, ({self.name: self.x}, self.subnet))
        self.logits, self.gradient = self.own.detach(), torch.empty_like(self.own)

    def and_back(self) -> None:
        found = torch.autograd.grad(self.own, self.leaves, self.gradient, allow_unused=True)
        used = [(p, g) for p, g in zip(self.net.parameters(), found, strict=True) if g is not None]
        self.parameters, self.gradients = zip(*used, strict=True)


@pytest.fixture
def captured(monkeypatch):
    """The sub-networks that were captured."""
    found = []

    def capture(net, name, x, subnet, pool):
        assert pool == "pool"
        found.append(subnet)
        return Recomputed(net, name, x, subnet)

    monkeypatch.setattr(replay, "Graphs", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    return found


def two_subnets(net):
    space = make_space(net)
    return net.largest(), net.subnet(space, spaces.smallest(space))


def inputs(seed: int, rows: int = 5) -> dict[str, torch.Tensor]:
    return {"features": torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, 6)).astype(np.float32))}


def gradients(net) -> dict[str, torch.Tensor | None]:
    found = {name: None if p.grad is None else p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad(set_to_none=True)
    return found


def test_draws_recur():
    draws = [replay.draw(step) for step in range(3 * replay.RECURRING * replay.TIMES)]
    assert len(set(draws)) == 3 * replay.RECURRING
    assert all(draw <= step for step, draw in enumerate(draws))
    for block in range(3):
        part = draws[block * replay.RECURRING * replay.TIMES :][: replay.RECURRING * replay.TIMES]
        assert part == part[: replay.RECURRING] * replay.TIMES


def test_the_second_pass_is_captured_and_the_third_replayed(captured):
    net = make_net()
    runs = replay.Replayed(net)
    largest, smallest = two_subnets(net)
    for seed, subnet, want in ((0, largest, 0), (1, smallest, 0), (2, largest, 1), (3, largest, 1), (4, smallest, 2), (5, smallest, 2)):
        runs(inputs(seed), subnet).square().sum().backward()
        assert len(captured) == want
        found = gradients(net)
        net(inputs(seed), subnet).square().sum().backward()
        for name, gradient in gradients(net).items():
            torch.testing.assert_close(found[name], gradient)
    runs(inputs(6, rows=3), largest).sum().backward()
    assert len(captured) == 2, "a batch of another size"
    net.eval()
    runs(inputs(7), largest).sum().backward()
    assert len(captured) == 2, "without dropout it is another pass"
    assert runs.largest() == largest, "all else is the network's"


def test_what_cannot_be_replayed_runs_as_ever(captured):
    net = make_net()
    runs = replay.Replayed(net)
    largest, smallest = two_subnets(net)
    for subnet in (largest, smallest, largest):
        runs(inputs(0), subnet).sum().backward()
    kept = runs(inputs(1), largest)
    runs(inputs(1), smallest).sum().backward()
    assert captured == [largest], "another pass waits to be back-propagated"
    kept.sum().backward()
    with torch.no_grad():
        runs(inputs(1), smallest)
    assert captured == [largest], "there is nothing to back-propagate"
    runs(inputs(1), smallest).sum().backward()
    assert captured == [largest, smallest]


def test_new_draws_forget_old_graphs(captured):
    net = make_net()
    runs = replay.Replayed(net)
    for step in (0, 1, 2, replay.RECURRING * replay.TIMES):
        runs.begin(step)
        runs(inputs(step), net.largest()).sum().backward()
    assert len(captured) == 1
    runs(inputs(0), net.largest()).sum().backward()
    assert len(captured) == 2


@pytest.mark.parametrize("half", [False, True])
def test_a_capture_is_of_the_parameters_that_a_network_uses(monkeypatch, half):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    caches = []

    @contextlib.contextmanager
    def graph(made, pool):
        yield
        caches.append(pool)

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch, "empty_like", torch.ones_like)
    net = make_net()
    _, smallest = two_subnets(net)
    x = inputs(0)["features"]
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        made = replay.Graphs(net, "features", x, smallest, "pool")
        assert torch.is_autocast_cache_enabled()
    assert caches == ["pool", "pool"], "forth and back"
    assert all(p.grad is None for p in net.parameters())
    replay.add(made.parameters, made.gradients)
    replay.add(made.parameters, made.gradients)
    found = gradients(net)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        logits = net({"features": x}, smallest)
    torch.testing.assert_close(made.logits, logits.detach())
    (2 * logits.sum()).backward()
    for name, gradient in gradients(net).items():
        torch.testing.assert_close(found[name], gradient)
    assert any(gradient is None for gradient in found.values()), "of the layer that it leaves out"


def test_gradients_are_copies():
    parameter, gradient = torch.nn.Parameter(torch.zeros(2)), torch.ones(2)
    replay.add([parameter], [gradient])
    replay.add([parameter], [gradient])
    assert gradient.tolist() == [1, 1]
    assert parameter.grad.tolist() == [2, 2]


def test_training_without_a_gpu_refuses(tmp_path):
    with pytest.raises(RecipeError, match=r"finetune\.cuda_graphs needs an NVIDIA GPU and images kept there, and this trains on cpu"):
        finetune.train(make_job(tmp_path / "run", cuda_graphs=True), Silent())


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_training_by_graphs_ends_where_launches_do(tmp_path, monkeypatch, precision):
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    monkeypatch.setattr(replay, "RECURRING", 2)
    monkeypatch.setattr(replay, "TIMES", 5)
    found, logs, made = [], [], finetune._graphs
    for way in ("graphs", "launches", "launches"):
        job = make_job(tmp_path / f"{way} {len(found)}", "vit", recipe="bignas", epochs=12, cuda_graphs=True, mixed_precision=precision)
        job.net.config.hidden_dropout_prob = job.net.config.attention_probs_dropout_prob = 0.0
        for module in job.net.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        job = replace(job, train=as_images(job.train), validation=as_images(job.validation), keep_best=False)
        monkeypatch.setattr(finetune, "_graphs", made if way == "graphs" else lambda *_: None)
        logs.append(finetune.train(job, Silent()))
        found.append(weights(job.net))
    worst = max(float((found[0][name] - found[1][name]).abs().max()) for name in found[0])
    again = max(float((found[1][name] - found[2][name]).abs().max()) for name in found[0])
    assert worst <= max(1e-5, 3 * again), "no further apart than two trainings by launches are"
    assert logs[0].steps == logs[1].steps
    start = weights(make_net("vit"))
    moved = max(float((found[0][name] - start[name]).abs().max()) for name in start)
    assert moved > 100 * worst, "they learned something"

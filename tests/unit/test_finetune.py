"""Training: the loss against Eq. 1 written out in NumPy, and interruptions against a run that had none."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import ViTConfig

from nascompile import finetune, network, plugins, space as spaces
from nascompile.data import Split
from nascompile.families.toy import ToyConfig
from nascompile.preprocess import Preprocessing, Preprocessor
from nascompile.progress import Silent
from nascompile.recipes import StepBatch, Terms
from nascompile.records import Target
from nascompile.settings import FinetuneSettings
from nascompile.supernet import Supernet, plain

torch.set_num_threads(1)

TASK = plugins.get("tasks", "classification")


class Backend:
    name, width_multiple = "made-up", 8

    def supports(self, precision) -> str:
        return ""


def split(samples: int, seed: int, name: str = "features", shape: tuple[int, ...] = (6,)) -> Split:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((samples, *shape)).astype(np.float32)
    labels = (values.reshape(samples, -1)[:, :3]).argmax(1).astype(np.int64)
    preprocessor = Preprocessor(Preprocessing(modality="vector", inputs=(name,)), {})
    return Split(f"s{seed}", {name: values}, labels, np.zeros((samples, 32), np.uint8), f"digest-{seed}", preprocessor)


def make_net(kind: str = "toy") -> Supernet:
    torch.manual_seed(0)
    if kind == "toy":
        family = plugins.get("families", "toy")
        return Supernet(family, family.create(ToyConfig(features=6, hidden=8, width=16, rank=4, layers=2, num_labels=3)))
    family = plugins.get("families", "vit")
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=4, patch_size=2, num_channels=1,
        num_labels=3, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.1,
    )  # fmt: skip
    return Supernet(family, family.create(config))


def make_space(net: Supernet):
    target = Target(device="d", backend="made-up", workload=net.family.workload(net.config, 1, 0))
    return network.search_space(net.family, net.config, Backend(), target, "model", (1, 0))


def make_job(
    folder: Path, kind: str = "toy", recipe: str = "instatune", epochs: int = 2, task=TASK, aware: int = 0, **changes
) -> finetune.Job:
    net = make_net(kind)
    settings = FinetuneSettings(batch_size=8, learning_rate=1e-2, **changes)
    terms = finetune.terms_of(task, plugins.get("recipes", recipe), settings)
    shape = ("features", (6,)) if kind == "toy" else ("pixel_values", (1, 4, 4))
    folder.mkdir(parents=True, exist_ok=True)
    train = split(36, 1, *shape)
    return finetune.Job(
        net=net, space=make_space(net), recipe=plugins.get("recipes", recipe), terms=terms, settings=settings,
        train=train, validation=split(24, 2, *shape), metric="accuracy", epochs=epochs, folder=folder, seed=3,
        teacher=3 * np.eye(3, dtype=np.float32)[train.labels], aware_epochs=aware,
    )  # fmt: skip


def weights(net: Supernet) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------------------------------------- Equation 1


class Outputs:
    """A network whose outputs are given: first the largest one's, then those of the sub-networks in turn."""

    def __init__(self, logits: np.ndarray) -> None:
        self.logits = [torch.tensor(values, requires_grad=True) for values in logits]
        self.points: list = []
        self.calls = 0

        self.training = True

    def eval(self):
        self.training = False

    def largest(self):
        return "largest"

    def subnet(self, space, point):
        self.points.append(point)
        return len(self.points)

    def __call__(self, inputs, which):
        self.calls += 1
        return self.logits[0 if which == "largest" else which]


def softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def kl(student, teacher, rho):
    """ρ² · mean over the batch of Σ_c t_c (ln t_c - ln s_c) of softened outputs."""
    s, t = softmax(student / rho), softmax(teacher / rho)
    return rho**2 * float(np.mean((t * (np.log(t) - np.log(s))).sum(axis=1)))


def cross_entropy(logits, labels):
    return float(np.mean([-np.log(p[y]) for p, y in zip(softmax(logits), labels, strict=True)]))


@pytest.mark.parametrize("rho", [1.0, 3.0])
@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("g", [0.0, 0.5, 1.0])
def test_instatune_is_equation_1(g, m, rho):
    rng, a = np.random.default_rng(0), 0.3
    logits, labels, teacher = rng.standard_normal((1 + m, 5, 4)), np.array([0, 3, 1, 1, 2]), rng.standard_normal((5, 4))
    net, space = Outputs(logits), make_space(make_net())
    batch = StepBatch({}, torch.tensor(labels), torch.tensor(teacher))
    recipe = plugins.get("recipes", "instatune")
    terms = Terms(TASK, None, a, g, rho, m)
    losses = []
    for loss in recipe.losses(net, space, batch, np.random.default_rng(5), terms):
        losses.append(float(loss))
        loss.backward()
    want = a * (cross_entropy(logits[0], labels) + sum(cross_entropy(z, labels) for z in logits[1:]))
    want += (1 - a) * g * kl(logits[0], teacher, rho)
    want += (1 - a) * sum((1 - g) * kl(z, logits[0], rho) + g * kl(z, teacher, rho) for z in logits[1:])
    assert sum(losses) == pytest.approx(want, rel=1e-9)  # float64 both
    assert len(losses) == net.calls == recipe.passes(terms) == 1 + m
    assert len(set(net.points)) == m  # drawn anew for each

    # the super-network learns from its labels and its teacher, never from its own pupils
    def of_largest(z):
        return a * cross_entropy(z, labels) + (1 - a) * g * kl(z, teacher, rho)

    step = 1e-6
    for at in ((0, 0), (3, 2)):
        up, down = logits[0].copy(), logits[0].copy()
        up[at] += step
        down[at] -= step
        assert float(net.logits[0].grad[at]) == pytest.approx((of_largest(up) - of_largest(down)) / (2 * step), abs=1e-7)


def test_subnetworks_are_drawn_from_the_seed_alone():
    space, recipe, terms = make_space(make_net()), plugins.get("recipes", "instatune"), Terms(TASK, None, 0.3, 1.0, 1.0, 2)
    drawn = []
    for seed in (5, 5, 6):
        net = Outputs(np.zeros((3, 2, 3)))
        batch = StepBatch({}, torch.tensor([0, 1]), torch.zeros(2, 3, dtype=torch.float64))
        list(recipe.losses(net, space, batch, np.random.default_rng(seed), terms))
        drawn.append(net.points)
    assert drawn[0] == drawn[1] != drawn[2]


# ---------------------------------------------------------------------------------------------- a run


class Killed(Exception):
    pass


class Bomb(Silent):
    def __init__(self, at: int) -> None:
        self.at = at

    def step(self, label, done, total):
        if done == self.at:
            raise Killed


class Album(Silent):
    """The weights after every step."""

    def __init__(self, net: Supernet) -> None:
        self.net, self.pictures = net, {0: weights(net)}

    def step(self, label, done, total):
        self.pictures[done] = weights(self.net)


EVERYTHING = {"aware": 1, "ema_decay": 0.9, "accumulation": 3, "mixed_precision": "bf16", "recipe": "bignas"}


@pytest.mark.parametrize(("kind", "options"), [("toy", {}), ("vit", {}), ("vit", EVERYTHING)])
def test_a_killed_training_ends_with_the_very_weights_of_an_uninterrupted_one(kind, options, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "CHECKPOINT_SECONDS", 0.0)
    whole = make_job(tmp_path / "whole", kind, **options)
    album = Album(whole.net)
    log = finetune.train(whole, album)
    assert log.steps == 8  # 36 samples in batches of 8: 4 steps an epoch
    assert not same(album.pictures[7], album.pictures[8])
    kills = sorted(np.random.default_rng(0).choice(np.arange(2, 9), size=3, replace=False).tolist())
    for kill in kills:
        with pytest.raises(Killed):
            finetune.train(make_job(tmp_path / "killed", kind, **options), Bomb(kill))
    job = make_job(tmp_path / "killed", kind, **options)
    torch.manual_seed(99)  # nothing may hang on the state of the global generator
    rest = Album(job.net)
    resumed = finetune.train(job, rest)
    steps = sorted(set(rest.pictures) - {0})
    assert steps == list(range(kills[-1], 9))  # the step that was killed was not yet kept; those before it are not repeated
    assert all(same(rest.pictures[step], album.pictures[step]) for step in steps)
    assert same(weights(job.net), weights(whole.net))
    assert msgspec.structs.replace(resumed, seconds=0) == msgspec.structs.replace(log, seconds=0)
    assert len(log.losses) == 2
    assert log.quantized_from == (1.0 if options else None)


def again(folder: Path, kind: str = "toy") -> finetune.Job:
    """The same job as after a restart of the program: new weights, the old folder."""
    return make_job(folder, kind)


def test_dropout_is_on_in_training_so_that_resuming_must_restore_it(tmp_path):
    """Guards the fixture above: with another seed of the same data order the weights differ only through dropout."""
    nets = []
    for rank, seed in enumerate((1, 2)):
        net = make_net("vit").train()
        torch.manual_seed(seed)
        nets.append(net({"pixel_values": torch.ones(2, 1, 4, 4)}, net.largest()))
        assert nets[rank].requires_grad
    assert not torch.equal(*nets)


def test_checkpoints_hold_tensors_and_json_only(tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "CHECKPOINT_SECONDS", 0.0)
    job = make_job(tmp_path / "run")
    with pytest.raises(Killed):
        finetune.train(job, Bomb(6))
    files = sorted(str(path.relative_to(job.folder)) for path in job.folder.rglob("*") if path.is_file())
    assert files == ["best.safetensors", "checkpoint-5/model.safetensors", "checkpoint-5/optimizer.safetensors", "checkpoint.json"]
    assert json.loads((job.folder / "checkpoint.json").read_text())["step"] == 5
    for path in job.folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as stream:
            assert list(stream.keys())
    with safe_open(job.folder / "checkpoint-5" / "optimizer.safetensors", "pt") as stream:
        assert {name.partition(".")[2] for name in stream.keys()} == {"step", "exp_avg", "exp_avg_sq"}  # noqa: SIM118


def test_a_checkpoint_that_was_being_written_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "CHECKPOINT_SECONDS", 0.0)
    whole = make_job(tmp_path / "whole")
    finetune.train(whole, Silent())
    job = make_job(tmp_path / "run")
    with pytest.raises(Killed):
        finetune.train(job, Bomb(4))
    torn = job.folder / "checkpoint-4"  # a kill between its first file and the pointer
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half a file")
    restarted = again(job.folder)
    finetune.train(restarted, Silent())
    assert same(weights(restarted.net), weights(whole.net))
    assert not [p.name for p in job.folder.rglob("*.part")]


class Scripted:
    """A task whose validation scores come from a list."""

    def __init__(self, scores: list[float]) -> None:
        self.scores = iter(scores)

    def __getattr__(self, name):
        return getattr(TASK, name)

    def score(self, metric, logits, labels):
        return next(self.scores), 1.0


@pytest.mark.parametrize(
    ("scores", "best_epoch", "epochs", "stopped"),
    [
        ([10, 40, 60, 50, 60, 59, 99], 2, 5, "no improvement"),  # a tie is no improvement
        ([10, 20, 30, 40, 50, 60, 70], 6, 6, "finished"),
        ([90, 20, 30, 40], 0, 3, "no improvement"),  # training only made it worse: what it began with
    ],
)
def test_training_stops_early_and_keeps_its_best_weights(scores, best_epoch, epochs, stopped, tmp_path):
    job = make_job(tmp_path / "run", recipe="plain", epochs=6, task=Scripted(scores), patience=3)
    album = Album(job.net)
    log = finetune.train(job, album)
    assert (log.stopped, log.epochs, log.best_epoch, log.best) == (stopped, epochs, best_epoch, scores[best_epoch])
    assert log.validation == tuple((float(e), float(s)) for e, s in enumerate(scores[: epochs + 1]))
    assert [n for n, picture in album.pictures.items() if same(picture, weights(job.net))] == [4 * best_epoch]


def test_the_last_weights_are_kept_where_the_best_are_not_asked_for(tmp_path):
    job = replace(make_job(tmp_path / "run", recipe="plain", epochs=3, task=Scripted([10, 60, 50, 40])), keep_best=False)
    album = Album(job.net)
    log = finetune.train(job, album)
    assert same(weights(job.net), album.pictures[12])
    assert (log.best, log.best_epoch) == (40, 3)


def test_a_metric_to_be_minimized_is_not_maximized(tmp_path):
    class Error(Scripted):
        def direction(self, metric):
            return "minimize"

    job = make_job(tmp_path / "run", recipe="plain", epochs=2, task=Error([5, 2, 9]))
    log = finetune.train(job, Silent())
    assert (log.best_epoch, log.best) == (1, -2)


def test_a_deadline_ends_training_with_a_validation_and_its_best_weights(tmp_path):
    job = replace(make_job(tmp_path / "run", recipe="plain", epochs=50, task=Scripted([10, 20])), deadline=time.monotonic() - 1)
    album = Album(job.net)
    log = finetune.train(job, album)
    assert (log.stopped, log.steps, log.best) == ("time", 1, 20)
    assert same(weights(job.net), album.pictures[1])


def test_training_learns(tmp_path):
    """The labels are the largest of three inputs, which a few steps get better at than chance."""
    log = finetune.train(make_job(tmp_path / "run", recipe="plain", epochs=12), Silent())
    assert log.best > 60
    assert log.validation[0][1] < log.best


def test_the_log_counts_sample_gradient_passes(tmp_path):
    log = finetune.train(make_job(tmp_path / "run", epochs=1, random_subnets=2), Silent())
    assert log.samples == 4 * 8 * 3  # steps, batch, the super-network and two sub-networks


def test_sorting_by_importance_gives_a_space_with_the_found_order():
    net = make_net()
    with torch.no_grad():
        net.model.blocks[0].out.weight.zero_()
        net.model.blocks[0].out.bias.zero_()  # does nothing: the last in the order unless its absence is a tie
    train = split(36, 1)
    target = Target(device="d", backend="made-up", workload=net.family.workload(net.config, 1, 0))

    def space_of(order):
        return network.search_space(net.family, net.config, Backend(), target, "m", order)

    space = finetune.sort_by_importance(net, space_of, train, TASK)
    assert sorted(space.layer_order) == [0, 1]
    assert space == space_of(space.layer_order)
    smallest = spaces.smallest(space)
    assert spaces.kept_layers(space, smallest) == space.layer_order[:1]


def test_teacher_logits_are_kept_for_the_same_weights_and_data_only(tmp_path):
    net, data = make_net(), split(20, 1)
    path = tmp_path / "logits.npy"
    first = finetune.teacher_logits(net, data, path, Silent())
    want = net.model(torch.from_numpy(data.inputs["features"])).logits.detach().numpy()
    np.testing.assert_allclose(first, want, atol=1e-5)  # float32 sums of 16 terms of order 1, in another order
    stamp = path.stat().st_mtime_ns
    np.testing.assert_array_equal(finetune.teacher_logits(net, data, path, Silent()), first)
    assert path.stat().st_mtime_ns == stamp
    with torch.no_grad():
        net.model.classifier.bias.add_(1.0)
    np.testing.assert_allclose(finetune.teacher_logits(net, data, path, Silent()), first + 1, atol=1e-5)
    assert finetune.teacher_logits(net, split(16, 2), path, Silent()).shape == (16, 3)


def test_an_epoch_reads_no_sample_twice_and_each_epoch_in_another_order(tmp_path, monkeypatch):
    job, read, plain = make_job(tmp_path / "run", recipe="plain", epochs=2), [], finetune.load_batch

    def load_batch(split, rows, device="cpu"):
        read.extend([rows.tolist()] if split is job.train else [])
        return plain(split, rows, device)

    monkeypatch.setattr(finetune, "load_batch", load_batch)
    finetune.train(job, Silent())
    epochs = [[row for rows in part for row in rows] for part in (read[:4], read[4:])]
    assert all(len(set(rows)) == 32 for rows in epochs)  # 36 samples: a batch of 4 is left out
    assert epochs[0] != epochs[1]


def test_no_text_is_left_out_for_its_length():
    """36 texts in batches of 8: four are left out of each epoch, not the longest four of every one."""
    lengths = np.arange(1, 37)
    mask = (np.arange(40)[None] < lengths[:, None]).astype(np.uint8)
    preprocessor = Preprocessor(Preprocessing(modality="text", inputs=("input_ids", "attention_mask")), {})
    texts = replace(split(36, 1), inputs={"input_ids": mask.astype(np.int32), "attention_mask": mask}, preprocessor=preprocessor)
    epochs = [np.concatenate(finetune._epoch(texts, 8, 0, epoch)) for epoch in range(40)]
    assert all(len(set(rows.tolist())) == 32 for rows in epochs)
    counts = np.bincount(np.concatenate(epochs), minlength=36)
    # read in 40 · 32/36 = 35.6 epochs each; a binomial's deviation is 2, and five of them
    assert abs(counts - 40 * 32 / 36).max() < 10


# ---------------------------------------------------------------------------------------------- two processes

WORKER = """
import os, sys, pathlib
sys.path[:0] = [{here!r}]
import torch
torch.set_num_threads(1)
from safetensors.torch import save_file
import test_finetune as t
from nascompile import finetune
folder = pathlib.Path({folder!r})
job = t.make_job(folder / "run", **{options!r})
read, plain = [], finetune.load_batch
def load_batch(split, rows, device="cpu"):
    read.extend([len(rows)] if split is job.train and job.net.training else [])
    return plain(split, rows, device)
finetune.load_batch = load_batch
log = finetune.train(job, t.Silent())
wanted = [4] * 4 if not {options!r}.get("accumulation") else [2, 2] * 8  # half of each batch of 8, maybe in two parts
assert read == wanted, read
(folder / (os.environ["RANK"] + ".json")).write_text(t.json.dumps([log.losses, log.validation]))
save_file(t.weights(job.net), folder / (os.environ["RANK"] + ".safetensors"))
"""


@pytest.mark.parametrize("options", [{"epochs": 1}, {"epochs": 2, "aware": 1, "accumulation": 2, "ema_decay": 0.5, "recipe": "bignas"}])
def test_two_processes_take_the_steps_of_one(options, tmp_path):
    """gloo on the CPU; each takes every other sample of a batch, and their mean gradient and loss are the batch's own."""
    from safetensors.torch import load_file

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = WORKER.format(here=str(Path(__file__).parent), folder=str(tmp_path), options=options)
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    common |= {"LOCAL_WORLD_SIZE": "2"}
    workers = [
        subprocess.Popen([sys.executable, "-c", code], env=common | {"RANK": str(r), "LOCAL_RANK": str(r)}, stderr=subprocess.PIPE)
        for r in range(2)
    ]
    for worker in workers:
        try:
            _, errors = worker.communicate(timeout=90)
        except subprocess.TimeoutExpired:
            for w in workers:
                w.kill()
            raise
        assert worker.returncode == 0, errors.decode()[-2000:]
    alone = make_job(tmp_path / "alone", **options)
    log = finetune.train(alone, Silent())
    for rank in range(2):
        losses, scores = json.loads((tmp_path / f"{rank}.json").read_text())
        # float32 means in another order, through at most 8 steps of Adam at 1e-2
        np.testing.assert_allclose(losses, log.losses, rtol=1e-4)
        assert [tuple(s) for s in scores] == list(log.validation)
        found = load_file(tmp_path / f"{rank}.safetensors")
        for name, value in weights(alone.net).items():
            # the same; the first steps of Adam are of size 1e-2 whatever the gradient
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-4)


# ---------------------------------------------------------------------------------------------- options


def test_a_batch_in_parts_takes_the_same_steps(tmp_path):
    whole, parts = make_job(tmp_path / "whole"), make_job(tmp_path / "parts", accumulation=3)
    logs = [finetune.train(job, Silent()) for job in (whole, parts)]
    np.testing.assert_allclose(logs[1].losses, logs[0].losses, rtol=1e-4)
    for name, value in weights(whole.net).items():
        torch.testing.assert_close(weights(parts.net)[name], value, rtol=0, atol=1e-4)  # float32 means in another order, 8 steps at 1e-2


def test_the_logged_loss_is_that_of_the_steps(tmp_path):
    job, found = make_job(tmp_path / "run"), []
    recipe = job.recipe

    class Watched:
        def __getattr__(self, name):
            return getattr(recipe, name)

        def losses(self, *arguments):
            for loss in recipe.losses(*arguments):
                found.append(loss.item())
                yield loss

    log = finetune.train(replace(job, recipe=Watched()), Silent())
    assert [epoch for epoch, _ in log.losses] == [1.0, 2.0]
    want = np.array(found).reshape(2, 4, 2).sum(axis=2).mean(axis=1)  # epochs, steps, passes
    np.testing.assert_allclose([loss for _, loss in log.losses], want, rtol=1e-6)


def test_products_of_a_step_are_in_bfloat16_where_asked_for(tmp_path, monkeypatch):
    seen = {"no": set(), "bf16": set()}
    for mixed, kinds in seen.items():
        job = make_job(tmp_path / mixed, "vit", mixed_precision=mixed)
        real = job.net.forward

        def forward(inputs, subnet, linear=plain, real=real, kinds=kinds, net=job.net):
            def watched(name, x, weight, bias):
                out = linear(name, x, weight, bias)
                kinds.add((net.training, out.dtype))
                return out

            logits = real(inputs, subnet, watched)
            assert logits.dtype == torch.float32  # losses are computed in it
            return logits

        monkeypatch.setattr(job.net, "forward", forward)
        log = finetune.train(job, Silent())
        assert np.isfinite([loss for _, loss in log.losses]).all()
        assert all(value.dtype == torch.float32 for value in weights(job.net).values())
    assert seen["no"] == {(True, torch.float32), (False, torch.float32)}
    assert seen["bf16"] == {(True, torch.bfloat16), (False, torch.float32)}  # scores stay in float32


def test_the_average_of_the_weights_is_what_is_validated_and_kept(tmp_path):
    job = make_job(tmp_path / "run", recipe="plain", epochs=1, task=Scripted([10, 20]), ema_decay=0.6)
    album = Album(job.net)
    finetune.train(job, album)
    want = album.pictures[0]
    for step in range(1, 5):
        decay = min(0.6, (1 + step) / (10 + step))
        want = {n: decay * want[n].double() + (1 - decay) * album.pictures[step][n].double() for n in want}
    for name, value in weights(job.net).items():
        torch.testing.assert_close(value.double(), want[name], rtol=0, atol=1e-6)  # float32 of values around 1, four steps
    assert not same(weights(job.net), album.pictures[4])


def test_scores_of_averaged_weights_are_of_those(tmp_path, monkeypatch):
    job, shown, real = make_job(tmp_path / "run", ema_decay=0.9), [], finetune._validate

    def validate(job, net, *rest):
        shown.append(weights(net))
        return real(job, net, *rest)

    monkeypatch.setattr(finetune, "_validate", validate)
    album = Album(job.net)
    log = finetune.train(job, album)
    best = [score for _, score in log.validation].index(log.best)
    assert same(shown[best], weights(job.net))
    assert not same(shown[1], album.pictures[4])  # nor is what training goes on with touched:
    plain_job = make_job(tmp_path / "plain")
    other = Album(plain_job.net)
    finetune.train(plain_job, other)
    assert all(same(album.pictures[step], other.pictures[step]) for step in album.pictures)


def test_the_learning_rate_of_bignas_falls_to_a_floor_and_stays(tmp_path):
    job = make_job(tmp_path / "run", recipe="bignas", epochs=250, decay_epochs=2.4, warmup=0.0, supernet_learning_rate=0.1)
    schedule = finetune._Schedule(job, 1000, 4)
    epochs = np.array([0, 24, 120, 236, 240, 249])
    # 0.97 per 2.4 epochs, and 0.05 once that is reached: after 2.4 ln 0.05 / ln 0.97 = 236.04 epochs
    want = 0.1 * np.maximum(0.05, 0.97 ** (epochs / 2.4))
    np.testing.assert_allclose([schedule(int(4 * e)) for e in epochs], want, rtol=1e-9)
    assert [schedule(4 * 237), schedule(999)] == [pytest.approx(0.005)] * 2
    scaled = replace(job, terms=replace(job.terms, decay_epochs=0.0, rate_floor=0.1))
    schedule = finetune._Schedule(scaled, 901, 4)
    np.testing.assert_allclose([schedule(s) for s in (1, 301, 601, 800, 900)], [0.1, 0.1 * 0.1**0.5, 0.01, 0.01, 0.01], rtol=1e-3)


def test_a_decay_of_weights_is_one_per_step_for_bignas_too(tmp_path):
    """With a learning rate and no gradient that is not zero, what is left of a step is the decay: once, though four networks ran."""
    job = make_job(tmp_path / "run", recipe="bignas", epochs=1, weight_decay=0.5, warmup=0.0)
    job = replace(job, settings=msgspec.structs.replace(job.settings, supernet_learning_rate=0.1))

    class Nothing:
        def __getattr__(self, name):
            return getattr(TASK, name)

        def loss(self, logits, *rest):
            return 0 * logits.sum()

        def distillation(self, logits, *rest):
            return 0 * logits.sum()

    before = weights(job.net)
    album = Album(job.net)
    finetune.train(replace(job, terms=replace(job.terms, task=Nothing())), album)
    for name, value in album.pictures[1].items():
        factor = 1 - 0.1 * 0.5 if value.ndim > 1 else 1
        torch.testing.assert_close(value, factor * before[name], rtol=1e-6, atol=0)


# ---------------------------------------------------------------------------------------------- recipes


def test_bignas_is_a_sandwich_that_learns_from_its_biggest():
    rng, n, rho = np.random.default_rng(0), 2, 2.0
    logits, labels = rng.standard_normal((2 + n, 5, 4)), np.array([0, 3, 1, 1, 2])
    net, space = Outputs(logits), make_space(make_net())
    recipe = plugins.get("recipes", "bignas")
    terms = Terms(TASK, None, 0.3, 1.0, rho, n)
    losses, modes = [], []
    for loss in recipe.losses(net, space, StepBatch({}, torch.tensor(labels), None), np.random.default_rng(5), terms):
        losses.append(float(loss))
        modes.append(net.training)
        loss.backward()
    assert losses[0] == pytest.approx(cross_entropy(logits[0], labels))
    assert losses[1:] == [pytest.approx(kl(z, logits[0], rho)) for z in logits[1:]]
    assert net.points[0] == spaces.smallest(space)
    assert len(set(net.points)) == 1 + n
    assert modes == [True, False, False, False]  # dropout for the biggest alone
    soft = softmax(logits[0])
    soft[np.arange(5), labels] -= 1
    np.testing.assert_allclose(net.logits[0].grad, soft / 5, atol=1e-12)  # the labels' gradient; nothing from its pupils


def test_spos_is_one_uniform_network_and_its_labels():
    space, recipe, terms = make_space(make_net()), plugins.get("recipes", "spos"), Terms(TASK, None, 0.3, 1.0, 1.0, 1)
    logits, labels = np.random.default_rng(0).standard_normal((2, 5, 3)), np.array([0, 2, 1, 1, 2])
    depths = []
    for seed in range(200):
        net = Outputs(logits)
        (loss,) = recipe.losses(net, space, StepBatch({}, torch.tensor(labels), None), np.random.default_rng(seed), terms)
        assert float(loss) == pytest.approx(cross_entropy(logits[1], labels))
        depths.append(dict(net.points[0].architecture)["depth"])
    assert abs(np.mean(np.array(depths) == 1) - 0.5) < 0.15  # two depths, 200 draws: a deviation is 0.035


# ---------------------------------------------------------------------------------------------- what it starts from


def plan(folder: Path, **changes) -> finetune.Plan:
    net = make_net()
    finetune.store_model(net, folder / "model", {})
    target = Target(device="d", backend="made-up", workload=net.family.workload(net.config, 1, 0))

    def space_of(config, order):
        return network.search_space(net.family, config, Backend(), target, "m", order)

    settings = FinetuneSettings(batch_size=8, learning_rate=1e-2, teacher_epochs=1, epochs=1, **changes)
    return finetune.Plan(
        family=net.family, model=folder / "model", head={"num_labels": 3}, space_of=space_of, train=split(36, 1), validation=split(24, 2),
        task=TASK, metric="accuracy", settings=settings, seed=3, out=folder / "run",
    )  # fmt: skip


class Stopped(Exception):
    pass


@pytest.mark.parametrize("recipe", ["instatune", "bignas"])
@pytest.mark.parametrize("start", ["teacher", "pretrained", "random"])
def test_a_super_network_starts_from_what_was_asked_for(start, recipe, tmp_path, monkeypatch):
    made, real = plan(tmp_path, start=start, recipe=recipe), finetune.train
    begun, rates = {}, {}

    def train(job, progress):
        begun[job.folder.name], rates[job.folder.name] = weights(job.net), finetune.peak_rate(job.recipe, job.settings, job.net.config)
        if job.folder.name == "supernet":
            raise Stopped
        return real(job, progress)

    monkeypatch.setattr(finetune, "train", train)
    with pytest.raises(Stopped):
        finetune.finetune(made, Silent())
    teacher, given = (finetune.load_file(folder / "model.safetensors") for folder in (made.out / "teacher", made.model))
    begun = {n.removeprefix("model."): v for n, v in begun["supernet"].items()}
    sums = {n: float(v.double().abs().sum()) for n, v in begun.items()}  # an order of units changes no sum
    source = {"teacher": teacher, "pretrained": given}.get(start)
    assert rates == {"teacher": 1e-2, "supernet": 5e-3 if start == "teacher" else 1e-2}
    assert (made.out / "training" / "teacher_logits.npy").is_file() == (recipe == "instatune")
    if source is not None:
        assert sums == {n: pytest.approx(float(v.double().abs().sum()), rel=1e-6) for n, v in source.items()}
        return
    assert not any(np.isclose(sums[n], float(v.double().abs().sum()), rtol=1e-3) for n, v in given.items() if v.ndim > 1)
    last = {n for n in sums if n.endswith(("out.weight", "out.bias"))}
    assert len(last) == 4
    zero = {n for n, total in sums.items() if total == 0}
    assert (last <= zero) == (recipe == "bignas")


def test_pretrained_weights_are_put_into_the_teachers_order(tmp_path, monkeypatch):
    """Every unit of the start is where the same unit of the ordered teacher is, so that prefixes keep what the teacher found important."""
    made, begun, real = plan(tmp_path, start="pretrained"), {}, finetune.train

    def train(job, progress):
        if job.folder.name == "supernet":
            begun["net"] = weights(job.net)
            raise Stopped
        return real(job, progress)

    monkeypatch.setattr(finetune, "train", train)
    with pytest.raises(Stopped):
        finetune.finetune(made, Silent())
    ordered = Supernet(made.family, made.family.load(str(made.out / "teacher")))
    finetune.sort_by_importance(ordered, lambda order: made.space_of(ordered.config, order), made.train, TASK)
    teacher, given = (finetune.load_file(folder / "model.safetensors") for folder in (made.out / "teacher", made.model))
    for i in range(2):
        name = f"blocks.{i}.up.bias"
        where = [int(np.flatnonzero(teacher[name].numpy() == value)[0]) for value in weights(ordered.model)[name].numpy()]
        assert where != sorted(where)
        np.testing.assert_array_equal(begun["net"][f"model.{name}"], given[name][where])

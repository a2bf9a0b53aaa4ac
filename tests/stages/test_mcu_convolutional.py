"""A convolutional network of torch as an engine: the same bytes in QEMU, on this computer and by the definition of every kernel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from nascompile import plugins, targets
from nascompile.mcu import board as boards, convolutional, interpreter, plan_check, program as programs, project, toolchain
from nascompile.mcu.convolutional import Shape, Stage
from nascompile.records import Workload

torch.set_num_threads(1)

MEAN, DEVIATION = (0.3,), (0.35,)
ODD = Shape(
    image=(15, 13, 1),
    stages=(
        Stage(kind="conv", channels=6, stride=2, pad=1, relu=True), Stage(kind="depthwise", channels=6, pad=1, relu=True),
        Stage(kind="conv", channels=11, kernel=1, relu=True), Stage(kind="average", channels=11, kernel=2, stride=1),
        Stage(kind="conv", channels=9, kernel=3, stride=1, relu=False),
    ),
    classes=7,
)  # fmt: skip
"""8 x 7, then 7 x 6, then 5 x 4 pixels."""


def module() -> nn.Sequential:
    """A network of that shape, its normalization as if trained."""

    def block(*convolution: int, **settings: int) -> tuple[nn.Module, ...]:
        return nn.Conv2d(*convolution, bias=False, **settings), nn.BatchNorm2d(convolution[1]), nn.ReLU()

    torch.manual_seed(5)
    net = nn.Sequential(
        *block(1, 6, 3, stride=2, padding=1), *block(6, 6, 3, padding=1, groups=6), *block(6, 11, 1), nn.AvgPool2d(2, stride=1),
        nn.Conv2d(11, 9, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, 7),
    )  # fmt: skip
    for _ in range(30):
        net.train()(torch.from_numpy(images(16)))
    return net.eval()


def images(n: int) -> np.ndarray:
    """Bright and dark ones, with slopes and noise."""
    rng = np.random.default_rng(7)
    level, down, across = rng.uniform(-0.4, 0.4, (3, n, 1, 1, 1))
    slopes = 0.5 + level + down * np.linspace(-1, 1, 15)[:, None] + across * np.linspace(-1, 1, 13)
    bytes_ = np.rint(255 * np.clip(slopes + rng.normal(0, 0.1, (n, 1, 15, 13)), 0, 1)) / 255
    return ((bytes_ - MEAN[0]) / DEVIATION[0]).astype(np.float32)


@pytest.fixture(scope="module")
def engine(tmp_path_factory, mcu_tools):
    """(runner, program, folder, torch module)."""
    net, x = module(), images(32)
    network = convolutional.of_torch(net, ODD.image, MEAN, DEVIATION)
    assert network.shape == ODD
    program = convolutional.lower(network, convolutional.observe(network, [x]), x[0])
    target = targets.make("stm32f746", "", Workload(resolution=(15, 13)))
    backend, folder = plugins.get("backends", "mcu_c"), tmp_path_factory.mktemp("engine")
    return backend.load(folder, backend.build(program, target, folder), target), program, folder, net


def test_host_qemu_and_interpreter_give_the_same_bytes(engine):
    runner, program, _, net = engine
    inputs = {"pixel_values": images(40)}
    found = runner.run(inputs)["logits"]
    scores = np.stack([interpreter.run(program, image) for image in runner.quantized(inputs)])
    np.testing.assert_array_equal(found, (scores * program.structure.logits.scale).astype(np.float32))
    np.testing.assert_array_equal(runner.emulate(inputs)["logits"], found)
    assert len(np.unique(found, axis=0)) == 40, "forty images, forty results"
    with torch.no_grad():
        want = net(torch.from_numpy(inputs["pixel_values"])).numpy()
    varies = want - want.mean(0)
    assert 10 * np.log10((varies**2).sum() / ((found - want) ** 2).sum()) > 20, "dB of what differs from image to image, against float"


def test_a_footprint_needs_no_training_and_no_build(engine):
    runner, program, folder, _ = engine
    target = targets.make("stm32f746", "", Workload())
    untrained = convolutional.untrained(ODD, 3)
    before = convolutional.lower(untrained, convolutional.observe(untrained, [images(8)]))
    planned = project.place(before.structure, boards.of_settings("stm32f746", dict(target.session)))
    ran = toolchain.run_emulated(folder, runner.board.core, program.sample[None])
    assert (ran.ram_bytes, ran.flash_bytes) == (planned.footprint.ram, planned.footprint.flash)
    assert plan_check.faults(programs.demand(program.structure), planned.plan) == []
    assert (ran.counts > 0).all()
    assert ran.counts.shape[1] == len(program.structure.operations)


def test_the_host_build_is_clean_under_sanitizers(engine, tmp_path):
    runner, program, _, _ = engine
    board = runner.board
    project.write(tmp_path, program, project.place(program.structure, board), board, program.sample, np.zeros(7, np.int32))
    toolchain.make(tmp_path, "firmware_host", "SANITIZE=-fsanitize=address,undefined -fno-sanitize-recover=all -g")
    x = program.structure.pixels.quantize(images(3))
    assert toolchain.run_host(tmp_path, x).outputs.tobytes() == b"".join(interpreter.run(program, image).tobytes() for image in x)

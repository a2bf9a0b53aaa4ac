"""Small convolutional networks of torch become integer programs: the same function in float, near it in integers."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

from nascompile.errors import UnsupportedError
from nascompile.mcu import convolutional, interpreter
from nascompile.mcu.convolutional import Shape, Stage

torch.set_num_threads(1)

MEAN, DEVIATION = (0.3,), (0.35,)


def block(*parts: nn.Module) -> nn.Sequential:
    """Convolution, normalization, ReLU."""
    return nn.Sequential(*parts, nn.BatchNorm2d(parts[0].out_channels), nn.ReLU())


def small(channels: int = 1, stem: nn.Module | None = None) -> nn.Sequential:
    """Every kind of stage; no number of channels is a multiple of four."""
    return nn.Sequential(
        block(stem or nn.Conv2d(channels, 7, 3, padding=1, bias=False)),
        block(nn.Conv2d(7, 7, 3, stride=2, padding=1, groups=7, bias=False)),
        block(nn.Conv2d(7, 10, 1)),
        nn.AvgPool2d(2),
        nn.Conv2d(10, 9, 3), nn.ReLU(),
        nn.Conv2d(9, 6, 1, stride=2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(6, 5),
    )  # fmt: skip


def trained(module: nn.Sequential, images: torch.Tensor) -> nn.Sequential:
    """With statistics that normalization has seen and gains of its own, ready to be used."""
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.weight.uniform_(0.5, 1.5)
                part.bias.normal_(0, 0.3)
        for _ in range(30):
            module.train()(images)
    return module.eval()


def pixels(n: int, image: tuple[int, int, int], mean=MEAN, deviation=DEVIATION) -> np.ndarray:
    """(n, channels, height, width) normalized bytes of a camera: bright and dark images, slopes, noise, each channel by itself."""
    height, width, channels = image
    rng = np.random.default_rng(1)
    level, down, across = rng.uniform(-0.4, 0.4, (3, n, channels, 1, 1))
    slopes = 0.5 + level + down * np.linspace(-1, 1, height)[:, None] + across * np.linspace(-1, 1, width)
    bytes_ = np.rint(255 * np.clip(slopes + rng.normal(0, 0.1, (n, channels, height, width)), 0, 1)) / 255
    return (bytes_ - np.reshape(mean, (-1, 1, 1))) / np.reshape(deviation, (-1, 1, 1))


def case(image=(17, 15, 1), module=None, mean=MEAN, deviation=DEVIATION):
    """(torch module, network, images)."""
    torch.manual_seed(2)
    x = pixels(24, image, mean, deviation)
    module = trained(module or small(image[2]), torch.from_numpy(x).float())
    return module, convolutional.of_torch(module, image, mean, deviation), x


@pytest.mark.parametrize("image", [(17, 15, 1), (16, 16, 3), (14, 19, 2)])
def test_the_plain_network_is_the_module(image):
    module, net, x = case(image)
    with torch.no_grad():
        want = module(torch.from_numpy(x).float()).numpy()
    np.testing.assert_allclose(convolutional.forward(net, x), want, atol=1e-4)
    kinds = [(s.kind, s.kernel, s.stride, s.relu) for s in net.shape.stages]
    assert kinds == [
        ("conv", 3, 1, True), ("depthwise", 3, 2, True), ("conv", 1, 1, True), ("average", 2, 2, False), ("conv", 3, 1, True),
        ("conv", 1, 2, False),
    ]  # fmt: skip


def decibels(program, images, want) -> float:
    """Of what differs from image to image, against what integers add to it."""
    found = np.stack([interpreter.run(program, image) for image in program.structure.pixels.quantize(images)])
    return 10 * np.log10(((want - want.mean(0)) ** 2).sum() / ((found * program.structure.logits.scale - want) ** 2).sum())


@pytest.mark.parametrize("image", [(17, 15, 1), (16, 16, 3), (14, 19, 2), (12, 13, 1)])
def test_integers_are_near_the_network(image):
    _, net, x = case(image)
    program = convolutional.lower(net, convolutional.observe(net, [x[:12], x[12:]]), x[0])
    assert decibels(program, x, convolutional.forward(net, x)) > 20
    assert (program.sample == np.rint(x[0].transpose(1, 2, 0) * DEVIATION * 255 + np.multiply(MEAN, 255) - 128)).all()


def test_a_program_keeps_every_tensor_near():
    _, net, x = case()
    program = convolutional.lower(net, convolutional.observe(net, [x]))
    want: dict[str, np.ndarray] = {}
    convolutional.forward(net, x[:1], lambda name, tensor: want.setdefault(name, tensor[0]))
    found = interpreter.trace(program, program.structure.pixels.quantize(x[:1])[0])
    for name, value in want.items():
        tensor = program.structure.tensor("pool" if name == "features" else name)
        off = (found[tensor.name].reshape(value.shape).astype(float) - tensor.zero_point) * tensor.scale - value
        assert np.abs(off).max() < 8 * tensor.scale, name  # rounding of what comes before, amplified by normalization
        if name.startswith("stages") and net.shape.stages[int(name[-1])].relu:
            assert tensor.zero_point == found[tensor.name].min() == -128, "ReLU is where bytes saturate"


def test_a_border_is_padded_by_what_normalization_makes_zero():
    """A stem whose taps sum to one and reach over the border: there it sees less of the image, whatever the image's grey."""
    stem = nn.Conv2d(1, 7, 3, padding=2)
    _, net, x = case((8, 8, 1), nn.Sequential(block(stem), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 5)), mean=(0.9,))
    program = convolutional.lower(net, convolutional.observe(net, [x]))
    assert program.structure.operations[1].kernel.linear.x_zero == round(0.9 * 255 - 128)
    assert decibels(program, x, convolutional.forward(net, x)) > 20


def test_channels_of_different_means():
    mean, deviation = (0.2, 0.5, 0.8), (0.2, 0.3, 0.25)
    _, padded, x = case((17, 15, 3), None, mean, deviation)
    with pytest.raises(UnsupportedError, match=r"another grey level in each channel: 51.0, 127.5, 204.0"):
        convolutional.lower(padded, convolutional.observe(padded, [x]))
    _, net, x = case((17, 15, 3), small(3, nn.Conv2d(3, 7, 3)), mean, deviation)
    assert decibels(convolutional.lower(net, convolutional.observe(net, [x])), x, convolutional.forward(net, x)) > 20


def test_a_depthwise_stem_has_its_own_normalization():
    mean, deviation = (0.49, 0.492, 0.494), (0.2, 0.3, 0.25)
    stem = nn.Sequential(block(nn.Conv2d(3, 3, 3, padding=1, groups=3)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5))
    _, net, x = case((9, 7, 3), stem, mean, deviation)
    assert decibels(convolutional.lower(net, convolutional.observe(net, [x])), x, convolutional.forward(net, x)) > 20


END = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return x + self.inner(x)


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ((nn.Conv2d(1, 4, 3), nn.GELU(), *END), r"1 \(GELU\) has no program"),
        ((nn.Conv2d(1, 4, 3), Residual(), *END), r"1 \(Residual\) has a forward of its own"),
        ((nn.Conv2d(1, 4, 3, dilation=2), *END), r"0 \(Conv2d\) has a dilation without a kernel: \(2, 2\)"),
        ((nn.Conv2d(1, 4, (3, 1)), *END), r"a kernel_size without a kernel: \(3, 1\)"),
        ((nn.Conv2d(1, 4, 3, padding="same"), *END), "a padding without a kernel: same"),
        ((nn.Conv2d(1, 4, 3, padding_mode="reflect", padding=1), *END), "a padding_mode without a kernel: reflect"),
        ((nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=2), *END), "a groups without a kernel: 2"),
        ((nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 5, groups=4), *END), "stages.1, a depthwise of 5 x 5, has no kernel"),
        ((nn.Conv2d(1, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), *END), "cannot be folded into the convolution before it"),
        ((nn.ReLU(), nn.Conv2d(1, 4, 3), *END), "follows no convolution"),
        ((nn.Conv2d(1, 4, 3), nn.AvgPool2d(2, padding=1), *END), "a setting that has no kernel"),
        ((nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5)), "leaves 2"),
        ((nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4, 5)), "has no mean over the image before it"),
        ((nn.Conv2d(1, 4, 3), *END, nn.ReLU()), r"4 \(ReLU\) comes too late"),
        ((nn.Conv2d(1, 4, 3),), "no classifier at its end"),
        ((nn.Conv2d(3, 4, 3), *END), "the first convolution takes 3 channels, the image has 1"),
        ((nn.Conv2d(1, 4, 11), *END), "nothing is left of the image: -1 x -1"),
        ((nn.Flatten(), *END), "the first stage is no convolution"),
    ],
)
def test_what_has_no_program_is_refused(parts, says):
    with pytest.raises(UnsupportedError, match=says):
        convolutional.of_torch(nn.Sequential(*parts), (9, 9, 1), (0.5,), (0.5,))


def test_sizes_that_do_not_fit_each_other():
    stem = Stage(kind="conv", channels=4)
    with pytest.raises(UnsupportedError, match=r"stages.1, a average of 3 x 3, makes 5 channels of 4"):
        Shape(image=(9, 9, 1), stages=(stem, Stage(kind="average", channels=5)), classes=3)
    with pytest.raises(UnsupportedError, match="has padding or ReLU"):
        Shape(image=(9, 9, 1), stages=(stem, Stage(kind="average", channels=4, relu=True)), classes=3)
    with pytest.raises(UnsupportedError, match="no calibration samples"):
        convolutional.observe(convolutional.untrained(Shape(image=(9, 9, 1), stages=(stem,), classes=3), 0), [])


def test_a_module_that_is_used_twice_is_there_twice():
    relu, stem = nn.ReLU(), nn.Conv2d(1, 4, 3)
    net = convolutional.of_torch(nn.Sequential(stem, relu, nn.Conv2d(4, 4, 1), relu, *END), (9, 9, 1), (0.5,), (0.5,))
    assert [stage.relu for stage in net.shape.stages] == [True, True]
    assert msgspec.json.decode(msgspec.json.encode(net.shape), type=Shape) == net.shape

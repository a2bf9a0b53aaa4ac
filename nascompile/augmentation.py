"""Training images varied at random: what a vision transformer that starts from random weights needs not to learn them by heart.

Every draw is of torch's own generator, which a training seeds with the number of the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

SHIFT = 1 / 8
"""Of the side: how far an image is moved at most."""
ERASED, ERASED_SHARE = 0.25, (0.02, 0.25)
"""Share of the images that lose a box, and the least and the most of the area that it takes."""
CONTRAST, BRIGHTNESS = 0.3, 0.3
"""Most that values are stretched about an image's mean, and moved, in their own scale of one standard deviation."""


def vary(images: Tensor, kinds: tuple[str, ...]) -> Tensor:
    """Normalized images (n, channels, height, width), each with its own draws; kinds are applied in the order of `KINDS`."""
    for name, change in KINDS.items():
        if name in kinds:
            images = change(images)
    return images


def crop(images: Tensor) -> Tensor:
    """Moved by up to an eighth of the side, what comes in repeats the edge."""
    n, _, height, width = images.shape
    up, left = max(1, round(SHIFT * height)), max(1, round(SHIFT * width))
    padded = F.pad(images, (left, left, up, up), mode="replicate").permute(0, 2, 3, 1)
    rows = torch.randint(2 * up + 1, (n, 1), device=images.device) + torch.arange(height, device=images.device)
    columns = torch.randint(2 * left + 1, (n, 1), device=images.device) + torch.arange(width, device=images.device)
    samples = torch.arange(n, device=images.device)[:, None, None]
    return padded[samples, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def flip(images: Tensor) -> Tensor:
    """Left and right changed in one of two."""
    return torch.where(torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5, images.flip(3), images)


def light(images: Tensor) -> Tensor:
    """Contrast and brightness changed."""
    stretch = 1 + CONTRAST * (2 * torch.rand(len(images), 1, 1, 1, device=images.device) - 1)
    move = BRIGHTNESS * (2 * torch.rand(len(images), 1, 1, 1, device=images.device) - 1)
    mean = images.mean((1, 2, 3), keepdim=True)
    spread = images.std((1, 2, 3), keepdim=True)
    return (images - mean) * stretch + mean + move * spread


def erase(images: Tensor) -> Tensor:
    """A box of noise in some, of the image's own mean and deviation (Zhong et al., 1708.04896)."""
    (n, _, height, width), device = images.shape, images.device
    least, most = ERASED_SHARE
    share = least + (most - least) * torch.rand(n, device=device)
    ratio = torch.exp((2 * torch.rand(n, device=device) - 1) * math.log(3))
    sides = ((share * ratio).sqrt() * height, (share / ratio).sqrt() * width)
    centre = torch.rand(2, n, device=device)
    y = (torch.arange(height, device=device) + 0.5 - (centre[0] * height)[:, None]).abs() <= sides[0][:, None] / 2
    x = (torch.arange(width, device=device) + 0.5 - (centre[1] * width)[:, None]).abs() <= sides[1][:, None] / 2
    box = (y[:, :, None] & x[:, None, :])[:, None] & (torch.rand(n, 1, 1, 1, device=device) < ERASED)
    noise = torch.randn_like(images) * images.std((1, 2, 3), keepdim=True) + images.mean((1, 2, 3), keepdim=True)
    return torch.where(box, noise, images)


KINDS: Mapping[str, Callable[[Tensor], Tensor]] = {"crop": crop, "flip": flip, "light": light, "erase": erase}
"""Name of a setting ▸ what it does, in the order of application."""

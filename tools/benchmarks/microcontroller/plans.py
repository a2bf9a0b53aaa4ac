"""One vision transformer in three plans, all built: every tensor in a place of its own, results over what they replace, fused operators."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from microcontroller import projects
from nascompile.errors import BudgetError
from nascompile.mcu import calibrated, transformer
from nascompile.programs import lower

SHAPE = transformer.Shape.uniform((224, 224, 3), 16, 96, 6, 3, 288, 100)
"""168 million multiply-accumulates."""
DEVICE, LARGER = "stm32f746", ("stm32h743",)
"""Where the plans are to fit, and boards for one that does not, smallest first."""
Plan = tuple[str, transformer.Fusion, dict[str, Any]]
"""Name, fusion, how it is placed."""
PLANS: tuple[Plan, ...] = (
    ("naive", "none", {"overlay": False}),
    ("in place", "none", {}),
    ("fused", "blocks", {"smallest": True}),
    ("fused, normalized again by each head", "all", {"smallest": True}),
)
IMAGES = 2


def made_up(shape: transformer.Shape, seed: int) -> calibrated.Network:
    """Weights drawn from a seed, of trained networks' size."""
    rng, parameters = np.random.default_rng(seed), {}
    sizes = {"embedding": (shape.patch**2 * shape.image[2], shape.width), "head": (shape.width, shape.classes)}
    for i, layer in enumerate(shape.layers):
        inner, hidden = (shape.width, layer.inner), (shape.width, layer.hidden)
        parts = {"query": inner, "key": inner, "value": inner, "out": inner[::-1], "up": hidden, "down": hidden[::-1]}
        sizes |= {f"layers.{i}.{part}": size for part, size in parts.items()}
    for name, (inputs, outputs) in sizes.items():
        parameters |= {f"{name}.weight": rng.normal(0, inputs**-0.5, (outputs, inputs)), f"{name}.bias": rng.normal(0, 0.1, outputs)}
    for name in ("norm", *(f"layers.{i}.norm{j}" for i in range(len(shape.layers)) for j in (1, 2))):
        parameters |= {f"{name}.weight": rng.normal(1, 0.1, shape.width), f"{name}.bias": rng.normal(0, 0.1, shape.width)}
    parameters |= {"position": rng.normal(0, 0.5, (shape.tokens, shape.width)), "class_token": rng.normal(0, 0.5, shape.width)}
    channels = shape.image[2]
    return calibrated.Network(shape, parameters, epsilon=1e-6, mean=(0.5,) * channels, deviation=(0.25,) * channels)


def measure(
    jobs: int, shape: transformer.Shape = SHAPE, device: str = DEVICE, larger: tuple[str, ...] = LARGER, plans: Sequence[Plan] = PLANS
) -> list[dict[str, Any]]:
    """A row a plan, the same network and images in all."""
    net, rng = made_up(shape, 1), np.random.default_rng(2)
    height, width, channels = shape.image
    images = rng.integers(0, 256, (IMAGES, channels, height, width)) / 255
    normalized = (images - np.reshape(net.mean, (-1, 1, 1))) / np.reshape(net.deviation, (-1, 1, 1))
    ranges = calibrated.observe(net, [normalized])
    found = []
    for name, fusion, placing in plans:
        program = lower(net, ranges, fusion, normalized[0])
        with tempfile.TemporaryDirectory() as folder:
            made, refused = _built(program, (device, *larger), Path(folder) / name, placing)
            _, facts = projects.compared(made, program.structure.pixels.quantize(normalized), IMAGES, jobs)
        found.append({"plan": name, "fits": made.board.device == device, "refused": refused, **facts})
    return found


def _built(program: Any, devices: tuple[str, ...], folder: Path, placing: dict[str, Any]) -> tuple[projects.Project, str]:
    """On the first of the boards that has room; what the others lack."""
    refused: list[str] = []
    for device in devices:
        try:
            return projects.build(program, projects.board_of(device), folder, **placing), "; ".join(refused)
        except BudgetError as error:
            refused.append(f"{device}: {error.message}")
    raise SystemExit("error: no board has room for a plan: " + "; ".join(refused))

"""Candidate ▸ Score for backends that take integer programs: every tensor of the program on its grid, in float sums.

The grids are those of `calibrated.CalibratedNumbers`, so what is scored here is the network whose bytes the project gives; sums, norms
and softmax are floats that the kernels' fixed point follows to a fraction of a step.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nascompile import plugins, programs
from nascompile.accuracy import Evaluator, scored_rows
from nascompile.data import Split
from nascompile.mcu import calibrated, torch_forward
from nascompile.mcu.board import of_settings
from nascompile.mcu.calibrated import CalibratedNumbers, Grid, Network
from nascompile.mcu.program import Program
from nascompile.mcu.transformer import fitting
from nascompile.quantization import ActivationRanges
from nascompile.records import INT8, Candidate, Score, SearchSpace, Target, digest, file_digest
from nascompile.scoring import score_of
from nascompile.supernet import Batch, Observer, Supernet, load_batches

BATCH = 16
"""Images at a time: tensors that stay in the cache while they are rounded."""
FLOAT = (".s", ".o", ".m")
"""Tensors that fused programs have in more than eight bits: scores of attention, and products before their residual is added."""
MIDDLE = (-4096, 4095)
"""Limits between two factors."""


@functools.cache
def arithmetic() -> str:
    """Hash of the code that emulates: scores of other code are not taken for its own."""
    return digest([file_digest(path) for path in sources()])


def sources() -> list[Path]:
    """Files that decide a score."""
    package = Path(__file__).resolve().parent
    own = [package / f"{name}.py" for name in ("program_accuracy", "programs", "supernet")]
    program = [package / "mcu" / f"{name}.py" for name in ("calibrated", "constants", "program", "torch_forward", "transformer")]
    return [*own, *program, *sorted((package / "families").glob("*.py")), *sorted((package / "quantization").glob("*.py"))]


class ProgramEvaluator:
    """Scores candidates of one set of weights on fixed calibration and validation samples, as `accuracy.Evaluator` does for graphs."""

    def __init__(
        self, net: Supernet, weights: Path, space: SearchSpace, task: Any, metric: str, calibration: Split, validation: Split,
        method: str, calibration_samples: int, validation_samples: int, seed: int, target: Target,
    ) -> None:  # fmt: skip
        self.net, self.space, self.task, self.metric, self.method, self.program_target = net, space, task, metric, method, target
        self.weights_digest = digest([(p.name, file_digest(p)) for p in sorted(weights.glob("*.safetensors"))])
        self.split_digest, self.batch = validation.digest, 1
        self.rows = scored_rows(validation, validation_samples, seed)
        """Positions in validation that candidates are scored on."""
        self.calibration = load_batches(calibration, scored_rows(calibration, calibration_samples, seed), BATCH)
        self.validation = load_batches(validation, self.rows, BATCH)
        self.target = target.id
        prepared = validation.preprocessor.settings
        pixel = 255 * prepared.rescale  # of a byte, where Network has it from 0 to 1
        self.mean, self.deviation = tuple(m / pixel for m in prepared.mean), tuple(s / pixel for s in prepared.std)
        self.digest = digest(
            space.precisions, arithmetic(), calibration.digest, method, calibration_samples, validation_samples, seed, metric,
            getattr(task, "signature", ""), target.workload,
        )  # fmt: skip
        self._weights = {name: parameter.detach().numpy() for name, parameter in net.model.named_parameters()}
        self._last: tuple[Candidate, Network] | None = None

    def on(self, target: str) -> ProgramEvaluator:
        """The same evaluator; there is one target."""
        assert target == self.target, "a search for several devices has no microcontroller"
        return copy.copy(self)

    def network(self, point: Candidate) -> Network:
        """The candidate in plain arrays."""
        if self._last is None or self._last[0] != point:
            net = self.net
            arguments = (net.family, net.config, self.space, point, self.program_target, self._weights, self.mean, self.deviation)
            self._last = point, programs.network_of(*arguments)
        return self._last[1]

    def program(self, point: Candidate, ranges: ActivationRanges | None, sample: Any) -> Program:
        """The calibrated program in the fastest plan that fits the device, else in the smallest one; `sample`: one input, normalized."""
        net, known = self.network(point), by_tensor(ranges or self.ranges(point))
        board = of_settings(self.program_target.device, dict(self.program_target.session))
        return fitting(lambda fusion: programs.lower(net, known, fusion, sample), board)[0]

    @torch.inference_mode()
    def ranges(self, point: Candidate) -> ActivationRanges:
        """Range of every tensor of the candidate's programs over the calibration samples."""
        net, observer = self.network(point), _TensorObserver()
        parameters = _tensors(net)
        for inputs, _ in self.calibration:
            images = torch_forward.pooled(net.shape, _only(inputs))
            torch_forward.forward(net.shape, parameters, images, net.epsilon, net.activation, see=observer.see)
        return observer.ranges(self.method)

    @torch.inference_mode()
    def score(self, point: Candidate, split: Split | None = None) -> Score:
        """The candidate's metric in the integers of its program, on validation or another split."""
        net = self.network(point)
        found = emulate(net, by_tensor(self.ranges(point)), self._batches(split))
        return self._score(found, split.digest if split else self.split_digest, self.digest)

    def reference(self, split: Split | None = None) -> Score:
        """The whole network's metric in float: there is no engine of it. `split`: another one, or all of this one."""
        whole = self.net.largest()
        self.net.eval()
        with torch.inference_mode():
            rows = [(self.net(inputs, whole).numpy(), labels.numpy()) for inputs, labels in self._batches(split)]
        logits, labels = (np.concatenate([row[i] for row in rows]) for i in range(2))
        return self._score((logits, labels), split.digest if split else self.split_digest, digest(self.digest, "float"))

    def _batches(self, split: Split | None) -> Sequence[Batch]:
        return self.validation if split is None else load_batches(split, np.arange(len(split)), BATCH)

    def _score(self, found: tuple[Any, Any], split: str, evaluator: str) -> Score:
        return score_of(self.task, self.metric, *found, split=split, weights=self.weights_digest, evaluator=evaluator)


def emulate(net: Network, ranges: calibrated.Ranges, batches: Iterable[Batch]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Logits (n, classes) and labels (n,) as the project of a network's program gives them, but for roundings within a step."""
    arithmetic = _Integers(net, ranges)
    rows = []
    for inputs, labels in batches:
        images = arithmetic.pixels(torch_forward.pooled(net.shape, _only(inputs)))
        logits = torch_forward.forward(
            net.shape, arithmetic.parameters, images, net.epsilon, net.activation, arithmetic.product, arithmetic.see
        )
        rows.append((logits.numpy(), labels.numpy()))
    return np.concatenate([r[0] for r in rows]), np.concatenate([r[1] for r in rows])


def by_tensor(ranges: ActivationRanges) -> calibrated.Ranges:
    """Tensor ▸ range."""
    return {name: (low, high) for name, low, high in ranges.sites}


class _TensorObserver(Observer):
    """Ranges of tensors by their names in programs, by the same methods as those of products' inputs."""

    def __init__(self) -> None:
        super().__init__({})
        self._scheme = plugins.get("quantization", INT8.name)

    def see(self, name: str, x: torch.Tensor) -> torch.Tensor:
        self.sites.setdefault(name, self._scheme)
        low, high = (float(v) for v in torch.aminmax(x))
        self.low[name], self.high[name] = min(low, self.low.get(name, 0.0)), max(high, self.high.get(name, 0.0))
        flat = x.flatten()
        self.samples.setdefault(name, []).append(flat[:: max(1, flat.numel() // 1024)].clone())
        return x


class _Integers:
    """Products and tensors of a program as floats that are on its grids."""

    def __init__(self, net: Network, ranges: calibrated.Ranges) -> None:
        self.net, self.numbers, self.ranges = net, CalibratedNumbers(net, ranges), ranges
        self.parameters = _tensors(net) | {"position": _float(self._positions())}
        self._products: dict[str, torch.Tensor] = {}
        self._grids: dict[str, Grid] = {}

    def _positions(self) -> np.ndarray[Any, Any]:
        """Rows of patches are stored as bytes; the first row is added to the class token beforehand."""
        rows = np.array(self.net.parameters["position"], np.float64)
        grid = self.numbers.positions
        rows[1:] = grid.scale * (grid.bytes(rows[1:]).astype(np.float64) - grid.zero)
        return rows

    def pixels(self, images: torch.Tensor) -> torch.Tensor:
        """Normalized images whose pixels are bytes."""
        own = self.net.pixels()
        scale, offset = (torch.tensor(values, dtype=images.dtype).reshape(-1, 1, 1) for values in (own.scale, own.offset))
        return ((images * scale + offset).round().clamp(-128, 127) - offset) / scale

    def product(self, name: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if name not in self._products:
            self._products[name] = _float(self._weight(name))
        return torch_forward.plain(name, x, self._products[name], bias)

    def _weight(self, name: str) -> np.ndarray[Any, Any]:
        """A map's weights (or a factor's) as its int8 rows read back; those of patches are for bytes."""
        own = self.net.parameters[name if name.endswith((".first", ".second")) else f"{name}.weight"]
        if name != "embedding":
            return _read_back(own)
        scale = np.tile(1 / np.broadcast_to(self.net.pixels().scale, self.net.shape.image[2]), self.net.shape.patch**2)
        return _read_back(own * scale) / scale

    def see(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if name.endswith(FLOAT) or name == "scores":
            return x
        if name not in self._grids:
            self._grids[name] = self.numbers.middle(name.removesuffix(".middle")) if name.endswith(".middle") else self.numbers.grid(name)
        grid = self._grids[name]
        if name.endswith(".middle"):
            return _rounded(x, grid.scale, *MIDDLE)
        return _rounded(x, grid.scale, -128 - grid.zero, 127 - grid.zero)


def _rounded(x: torch.Tensor, scale: float, low: int, high: int) -> torch.Tensor:
    """On the grid; several times as fast as torch's own fake quantization, which makes a mask for gradients."""
    return (x * (1 / scale)).round_().clamp_(low, high).mul_(scale)


def _read_back(weight: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    integers, scales = calibrated.stored(weight)
    return integers * scales[:, None]


def _tensors(net: Network) -> dict[str, torch.Tensor]:
    return {name: _float(value) for name, value in net.parameters.items()}


def _float(value: Any) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(value, np.float32))


def _only(inputs: Any) -> torch.Tensor:
    """The images."""
    found: torch.Tensor = next(iter(inputs.values()))
    return found


AnyEvaluator = Evaluator | ProgramEvaluator
"""What scores candidates: those of a backend that takes graphs, or of one that takes integer programs."""

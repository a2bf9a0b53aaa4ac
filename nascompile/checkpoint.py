"""Where a training stands, in files: tensors in safetensors, the rest in JSON, replaced as a whole. No random state is kept: every draw
comes from the seed and the number of the step."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from nascompile.errors import RecordError
from nascompile.records import write_atomic

BEST, BEST_QUANTIZED, POINTER = "best.safetensors", "best-quantized.safetensors", "checkpoint.json"


class Average:
    """An exponential moving average of a network's floats; after n steps the decay is at most (1 + n) / (10 + n)."""

    def __init__(self, net: nn.Module, decay: float) -> None:
        self.decay = decay
        self.restart(net)

    def restart(self, net: nn.Module) -> None:
        """From the weights as they are."""
        self.values = {name: value.detach().clone() for name, value in _floats(net)}

    @torch.no_grad()
    def follow(self, net: nn.Module, steps: int) -> None:
        """Take in the weights as they are after so many steps."""
        decay = min(self.decay, (1 + steps) / (10 + steps))
        torch._foreach_lerp_(list(self.values.values()), [value.detach() for _, value in _floats(net)], 1 - decay)

    @contextmanager
    def shown(self, net: nn.Module) -> Iterator[None]:
        """The network with the averages in place of its weights."""
        own = {name: value.detach().clone() for name, value in _floats(net)}
        self._set(net, self.values)
        try:
            yield
        finally:
            self._set(net, own)

    @staticmethod
    @torch.no_grad()
    def _set(net: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
        for name, value in _floats(net):
            value.copy_(values[name])


class State:
    """Steps, scores and the best weights so far."""

    def __init__(self) -> None:
        self.step, self.taken, self.seconds = 0, 0, 0.0
        self.history: list[tuple[float, float]] = []
        self.losses: list[tuple[float, float]] = []
        self.loss: float | torch.Tensor = 0.0
        self.summed = 0
        """Steps since the last entry of `losses`; `loss` is the sum of theirs, on the training device: reading it would wait for that."""
        self.best, self.best_epoch = float("-inf"), 0.0
        self.quantized = False
        """Whether training is quantization-aware by now; `ranges` are those of the inputs of its products."""
        self.ranges: dict[str, tuple[float, float]] = {}

    @property
    def kept(self) -> str:
        """Name of the file with the best weights."""
        return BEST_QUANTIZED if self.quantized else BEST

    def note(self, epoch: float, score: float, net: nn.Module, folder: Path, write: bool, *, anyway: bool = False) -> None:
        """Remember a validation score; keep the weights if it is the best so far, or anyway."""
        self.history.append((epoch, score))
        if anyway or score > self.best:
            self.best, self.best_epoch = score, epoch
            if write:
                store_tensors(net.state_dict(), folder / self.kept)

    def turn_quantized(self) -> None:
        """Scores from here on are of quantized networks, whose best weights are looked for anew."""
        self.quantized, self.best = True, float("-inf")

    def note_loss(self, epoch: float) -> None:
        """The mean loss of the steps since this was last called."""
        if self.summed:
            self.losses.append((epoch, float(self.loss) / self.summed))
        self.loss, self.summed = 0.0, 0

    def since_best(self, steps_per_epoch: int) -> float:
        return self.step / steps_per_epoch - self.best_epoch

    def store(self, folder: Path, net: nn.Module, optimizer: torch.optim.Optimizer, average: Average | None) -> None:
        """A checkpoint folder of its own, then the pointer to it, then the old ones go."""
        name = f"checkpoint-{self.step}"
        target = folder / name
        target.mkdir(parents=True, exist_ok=True)
        store_tensors(net.state_dict(), target / "model.safetensors")
        moments = {
            f"{index}.{key}": value if isinstance(value, torch.Tensor) else torch.tensor(value)
            for index, entry in optimizer.state_dict()["state"].items()
            for key, value in entry.items()
        }
        store_tensors(moments, target / "optimizer.safetensors")
        if average is not None:
            store_tensors(average.values, target / "average.safetensors")
        state = {
            "folder": name, "step": self.step, "taken": self.taken, "seconds": self.seconds, "history": self.history,
            "losses": self.losses, "loss": [float(self.loss), self.summed], "best": [self.best, self.best_epoch],
            "quantized": self.quantized, "ranges": self.ranges,
        }  # fmt: skip
        write_atomic(folder / POINTER, json.dumps(state).encode())
        for old in folder.glob("checkpoint-*"):
            if old.name != name:
                shutil.rmtree(old)

    @classmethod
    def resume(cls, folder: Path, net: nn.Module, optimizer: torch.optim.Optimizer, average: Average | None) -> State | None:
        """The last whole checkpoint, with weights, optimizer and average restored; None if there is none."""
        pointer = folder / POINTER
        if not pointer.is_file():
            return None
        state, stored = cls(), json.loads(pointer.read_text())
        state.quantized = stored["quantized"]
        if not (folder / state.kept).is_file():
            return None
        state.step, state.taken, state.seconds = stored["step"], stored["taken"], stored["seconds"]
        state.history = [(float(e), float(s)) for e, s in stored["history"]]
        state.losses = [(float(e), float(s)) for e, s in stored["losses"]]
        state.loss, state.summed = stored["loss"]
        state.best, state.best_epoch = stored["best"]
        state.ranges = {name: (float(low), float(high)) for name, (low, high) in stored["ranges"].items()}
        source = folder / stored["folder"]
        net.load_state_dict(load_file(source / "model.safetensors"))
        entries: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in load_file(source / "optimizer.safetensors").items():
            index, _, key = name.partition(".")
            entries.setdefault(int(index), {})[key] = value
        optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})
        if average is not None:
            kept = load_file(source / "average.safetensors")
            average.values = {name: kept[name].to(value.device) for name, value in average.values.items()}
        return state


def store_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    try:
        save_file({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, temporary)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RecordError(
            f"cannot write {path.name}: {error}",
            hint="free some space and run the same command again; it continues from the last checkpoint",
        ) from error


def _floats(net: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(name, value) for name, value in net.state_dict().items() if value.is_floating_point()]

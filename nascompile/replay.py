"""Passes over sub-networks as CUDA graphs: a small network's training step on a GPU is otherwise spent on launching its kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from nascompile.supernet import Subnet, Supernet

RECURRING, TIMES = 32, 64
"""Steps whose draws recur one after the other, and how often they do before others are drawn. A capture takes as long as two to three
passes that are launched one kernel at a time, and a replay a fifth to a tenth of one."""

Key = tuple[Any, ...]


def draw(step: int) -> int:
    """The number of a step's draw: of RECURRING * TIMES steps there are RECURRING different ones."""
    block, place = divmod(step, RECURRING * TIMES)
    return block * RECURRING + place % RECURRING


class _Pass(nn.Module):
    """The network as one of its sub-networks."""

    def __init__(self, net: Supernet, subnet: Subnet, name: str) -> None:
        super().__init__()
        self.net, self.subnet, self.name = net, subnet, name
        self.training = net.training

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.net({self.name: x}, self.subnet)
        return logits


class Replayed:
    """What recipes take for a super-network: a sub-network runs as ever at first, is captured the second time and replayed from then on.

    Inputs are one tensor, whose shape may differ between calls. Results and gradients are those of the network itself, which is trained in
    place. A pass that begins before the one before it was back-propagated is not captured: graphs share their memory.
    """

    def __init__(self, net: Supernet) -> None:
        self.net = net
        self._seen: dict[Key, _Pass | None] = {}
        """None: ran once, which made what a capture must find there: loaded kernels, workspaces."""
        self._inputs: dict[tuple[int, ...], torch.Tensor] = {}
        self._pool: Any = None
        self._pending = False
        self._block = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.net, name)

    def begin(self, step: int) -> None:
        """A step of training, and with the first one of new draws no old graphs."""
        self._pending = False
        if (block := step // (RECURRING * TIMES)) != self._block:
            self._block = block
            self._seen.clear()

    def __call__(self, inputs: Mapping[str, torch.Tensor], subnet: Subnet) -> torch.Tensor:
        [(name, x)] = inputs.items()
        key = (subnet.layers, tuple(sorted(subnet.values.items())), self.net.training, tuple(x.shape))
        if self._pending or not torch.is_grad_enabled() or key not in self._seen:
            if torch.is_grad_enabled():
                self._seen.setdefault(key)
            logits: torch.Tensor = self.net(inputs, subnet)
            return logits
        run = self._seen[key] or self._captured(key, subnet, name, x)
        result: torch.Tensor = run(self._inputs[x.shape].copy_(x)).clone()  # the next replay writes where this one has
        self._pending = True
        result.register_hook(self._done)  # type: ignore[no-untyped-call]
        return result

    def _done(self, gradient: torch.Tensor) -> None:
        self._pending = False

    def _captured(self, key: Key, subnet: Subnet, name: str, x: torch.Tensor) -> _Pass:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        if x.shape not in self._inputs:
            self._inputs[x.shape] = torch.empty_like(x)
        run = _Pass(self.net, subnet, name)
        # casts that autocast keeps would be read after their memory has gone to others
        with torch.autocast(x.device.type, torch.get_autocast_dtype(x.device.type), torch.is_autocast_enabled(x.device.type), False):
            torch.cuda.make_graphed_callables(run, (self._inputs[x.shape],), num_warmup_iters=0, allow_unused_input=True, pool=self._pool)
        self._seen[key] = run
        return run

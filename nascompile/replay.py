"""Passes over sub-networks as CUDA graphs: a small network's training step on a GPU is otherwise spent on launching its kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from nascompile.supernet import Subnet, Supernet

RECURRING, TIMES = 32, 64
"""Steps whose draws recur one after the other, and how often they do before others are drawn: a capture takes longer than a pass whose
kernels are launched one by one."""

Key = tuple[Any, ...]


def draw(step: int) -> int:
    """The number of a step's draw: of RECURRING * TIMES steps there are RECURRING different ones."""
    block, place = divmod(step, RECURRING * TIMES)
    return block * RECURRING + place % RECURRING


class Graphs:
    """A sub-network's pass and its way back, captured."""

    def __init__(self, net: Supernet, name: str, x: torch.Tensor, subnet: Subnet, pool: Any) -> None:
        # leaves of their own: the network's may belong to another pass, and a capture must not wait for the stream of that
        leaves = {name: parameter.detach().requires_grad_() for name, parameter in net.named_parameters()}
        kind = x.device.type
        self.x, self.ahead, self.back = x, torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # casts that autocast keeps would be read after their memory has gone to others
        uncached = torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False)
        with torch.cuda.graph(self.ahead, pool=pool), uncached:
            self.logits: torch.Tensor = functional_call(net, leaves, ({name: x}, subnet))
        self.gradient = torch.empty_like(self.logits)
        with torch.cuda.graph(self.back, pool=pool):
            found = torch.autograd.grad(self.logits, list(leaves.values()), self.gradient, allow_unused=True)
        self.logits = self.logits.detach()
        used = [(parameter, gradient) for parameter, gradient in zip(net.parameters(), found, strict=True) if gradient is not None]
        self.parameters, self.gradients = [parameter for parameter, _ in used], [gradient for _, gradient in used]


class _Replay(torch.autograd.Function):
    """Runs the graphs, and adds to the parameters' gradients itself."""

    @staticmethod
    def forward(ctx: Any, graphs: Graphs, x: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        ctx.graphs = graphs
        graphs.x.copy_(x)
        graphs.ahead.replay()
        return graphs.logits.clone()  # the next replay writes where this one has

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, None, None]:
        graphs: Graphs = ctx.graphs
        graphs.gradient.copy_(gradients[0])
        graphs.back.replay()
        add(graphs.parameters, graphs.gradients)
        return None, None, None


@torch.no_grad()
def add(parameters: Sequence[nn.Parameter], gradients: Sequence[torch.Tensor]) -> None:
    """To what the parameters have; those that have none get a copy."""
    sums, summands = [], []
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if parameter.grad is None:
            parameter.grad = gradient.clone()
        else:
            sums.append(parameter.grad)
            summands.append(gradient)
    if sums:
        torch._foreach_add_(sums, summands)


class Replayed:
    """What recipes take for a super-network: a sub-network runs as ever at first, is captured the second time and replayed from then on.

    Inputs are one tensor, whose shape may differ between calls. Results and gradients are those of the network itself, which is trained in
    place. A pass that begins before the one before it was back-propagated is not replayed: graphs share their memory.
    """

    def __init__(self, net: Supernet) -> None:
        self.net = net
        self._seen: dict[Key, Graphs | None] = {}
        """None: ran once, which made what a capture must find there: loaded kernels, workspaces."""
        self._inputs: dict[tuple[int, ...], torch.Tensor] = {}
        self._anchor = torch.zeros((), requires_grad=True)
        """So that there is something to back-propagate to."""
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
            self._pool = None  # one whose graphs are gone takes no others

    def __call__(self, inputs: Mapping[str, torch.Tensor], subnet: Subnet) -> torch.Tensor:
        [(name, x)] = inputs.items()
        key = (subnet.layers, tuple(sorted(subnet.values.items())), self.net.training, tuple(x.shape))
        if self._pending or not torch.is_grad_enabled() or key not in self._seen:
            if torch.is_grad_enabled():
                self._seen.setdefault(key)
            logits: torch.Tensor = self.net(inputs, subnet)
            return logits
        graphs = self._seen[key]
        if graphs is None:
            graphs = self._seen[key] = self._captured(name, x, subnet)
        found: torch.Tensor = _Replay.apply(graphs, x, self._anchor)  # type: ignore[no-untyped-call]
        self._pending = True
        found.register_hook(self._done)  # type: ignore[no-untyped-call]
        return found

    def _done(self, gradient: torch.Tensor) -> None:
        self._pending = False

    def _captured(self, name: str, x: torch.Tensor, subnet: Subnet) -> Graphs:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        if x.shape not in self._inputs:
            self._inputs[x.shape] = torch.empty_like(x)
        return Graphs(self.net, name, self._inputs[x.shape], subnet, self._pool)

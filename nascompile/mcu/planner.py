"""Where every tensor of a program lies in one block of memory (the arena), and which tiles fit beside it.

Memory is known before anything runs: a tensor lives from the step that writes it to the last that reads it, scratch during its step.
Blocks are placed first-fit, largest first and earliest first, with and without overlays; the smallest arena wins. Nothing here knows a
kernel.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from nascompile.errors import BudgetError

ALIGN = 8
"""Bytes: the widest load of a kernel, and what the linker rounds the arena up to."""


@dataclass(frozen=True)
class Step:
    """One operator as the planner sees it."""

    name: str
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    overlays: tuple[tuple[str, str], ...] = ()
    """(read, write): the result may take the place of what is read, if nobody needs that any more."""
    tiles: tuple[tuple[int, int], ...] = ((0, 0),)
    """(tile, bytes of scratch), fastest first and each smaller than the one before."""


@dataclass(frozen=True)
class Demand:
    """What has to be placed."""

    sizes: Mapping[str, int]
    """Tensor ▸ bytes."""
    steps: tuple[Step, ...]
    inputs: tuple[str, ...] = ()
    """Tensors that are there before the first step."""
    outputs: tuple[str, ...] = ()
    """Tensors that are still there after the last."""


@dataclass(frozen=True)
class Plan:
    """Byte offsets into the arena."""

    arena_bytes: int
    offsets: Mapping[str, int]
    scratch: tuple[tuple[int, int], ...]
    """Per step: (offset, bytes)."""
    tiles: tuple[int, ...]
    """Per step: the tile its scratch was chosen for."""
    live: tuple[int, ...]
    """Per step: bytes of everything that is needed while it runs, rounded up to `ALIGN` each."""
    overlaid: Mapping[str, str] = field(default_factory=dict)
    """Result ▸ the tensor whose place it took."""
    order: str = ""
    """The order that gave this arena: `size` or `time`."""

    @property
    def peak(self) -> int:
        """Index of the first step with the most live bytes."""
        return max(range(len(self.live)), key=lambda i: (self.live[i], -i))


@dataclass(frozen=True)
class _Block:
    """Bytes that stay at one place from step `first` to step `last`, both included."""

    names: tuple[str, ...]
    size: int
    first: int
    last: int


def lifetimes(demand: Demand) -> dict[str, tuple[int, int]]:
    """Tensor ▸ (step that writes it, last step that reads it); ValueError for a tensor read before it is written, or written twice."""
    first: dict[str, int] = dict.fromkeys(demand.inputs, 0)
    last: dict[str, int] = dict(first)
    for i, step in enumerate(demand.steps):
        if unknown := [name for name in step.reads if name not in first]:
            raise ValueError(f"step {step.name} reads {', '.join(unknown)}, which nothing has written")
        if twice := [name for name in step.writes if name in first]:
            raise ValueError(f"step {step.name} writes {', '.join(twice)} again")
        first |= dict.fromkeys(step.writes, i)
        last |= dict.fromkeys((*step.reads, *step.writes), i)
    if missing := [name for name in demand.outputs if name not in first]:
        raise ValueError(f"nothing writes the output {', '.join(missing)}")
    last |= dict.fromkeys(demand.outputs, len(demand.steps))  # read by whoever called
    return {name: (first[name], last[name]) for name in first}


def place(demand: Demand, choice: Sequence[int], *, overlay: bool = True) -> Plan:
    """The smallest arena found for one choice of tiles (an index per step)."""
    lives = lifetimes(demand)
    plans = []
    for overlaid in [_overlaid(demand, lives)] * overlay + [{}]:
        blocks = _blocks(demand, lives, choice, overlaid)
        for order, key in (("size", lambda b: (-b.size, b.first, b.names)), ("time", lambda b: (b.first, -b.size, b.names))):
            plans.append(_first_fit(demand, sorted(blocks, key=key), choice, overlaid, order, lives))
    return min(plans, key=lambda p: p.arena_bytes)  # the first of equals: overlays, largest first


def plan(demand: Demand, limit: int = 0, *, overlay: bool = True, smallest: bool = False) -> Plan:
    """The plan with the fastest tiles that fit `limit` bytes (0: no limit), or with the smallest tiles at all.

    BudgetError if none fits: it names the step at the peak, the tile it has, and by how much the limit is missed.
    """
    choice = [len(step.tiles) - 1 if smallest else 0 for step in demand.steps]
    found = place(demand, choice, overlay=overlay)
    while limit and found.arena_bytes > limit:
        if not (narrower := _narrower(demand, found, choice, limit)):
            raise BudgetError(_too_large(demand, limit, overlay))
        choice = narrower
        found = place(demand, choice, overlay=overlay)
    return found


def with_tiles(demand: Demand, tiles: Mapping[str, int], limit: int = 0, *, overlay: bool = True) -> Plan:
    """The plan with tiles that somebody chose (step name ▸ tile), the rest as `plan` finds it.

    BudgetError for a tile that there is not, and for tiles that do not fit: it names the nearest that do.
    """
    steps = list(demand.steps)
    if unknown := sorted(set(tiles) - {step.name for step in steps}):
        raise BudgetError(f"tiles for unknown operators: {', '.join(unknown)}", hint=f"operators: {', '.join(s.name for s in steps)}")
    for i, step in enumerate(steps):
        if step.name in tiles:
            fitting = tuple(pair for pair in step.tiles if pair[0] == tiles[step.name])
            if not fitting:
                known = ", ".join(str(tile) for tile, _ in step.tiles)
                raise BudgetError(f"operator {step.name} has no tile {tiles[step.name]}", hint=f"its tiles: {known}")
            steps[i] = replace(step, tiles=fitting)
    fixed = replace(demand, steps=tuple(steps))
    try:
        return plan(fixed, limit, overlay=overlay)
    except BudgetError as error:
        free = plan(demand, limit, overlay=overlay)  # raises its own error where no tiles help
        nearest = ", ".join(f"{s.name} {t}" for s, t in zip(demand.steps, free.tiles, strict=True) if tiles.get(s.name, t) != t)
        raise BudgetError(error.message, detail=error.detail, hint=f"tiles that fit ({free.arena_bytes:,} bytes): {nearest}") from error


def _overlaid(demand: Demand, lives: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    """Result ▸ what it replaces: as declared, where what is replaced dies in that step, is as large, and is replaced once.

    What a step reads twice is not replaced: its second reading may be one that does not bear it.
    """
    found: dict[str, str] = {}
    for i, step in enumerate(demand.steps):
        for read, write in step.overlays:
            fits = lives[read][1] == i and demand.sizes[read] == demand.sizes[write] and step.reads.count(read) == 1
            if fits and write not in found and read not in found.values():
                found[write] = read
    return found


def _blocks(demand: Demand, lives: Mapping[str, tuple[int, int]], choice: Sequence[int], overlaid: Mapping[str, str]) -> list[_Block]:
    """One block a chain of overlays, one a scratch."""
    chains: dict[str, list[str]] = {}
    root: dict[str, str] = {}
    for name in lives:  # in the order of writing, so that what is replaced comes first
        root[name] = root[overlaid[name]] if name in overlaid else name
        chains.setdefault(root[name], []).append(name)
    blocks = [
        _Block(tuple(names), _up(demand.sizes[names[0]]), lives[names[0]][0], max(lives[name][1] for name in names))
        for names in chains.values()
    ]
    scratch = (_Block((f"scratch of {i}",), _up(step.tiles[choice[i]][1]), i, i) for i, step in enumerate(demand.steps))
    return blocks + [block for block in scratch if block.size]


def _first_fit(
    demand: Demand, blocks: Sequence[_Block], choice: Sequence[int], overlaid: Mapping[str, str], order: str, names: Iterable[str]
) -> Plan:
    placed: list[tuple[int, _Block]] = []
    for block in blocks:
        offset, first, last = 0, block.first, block.last
        for start, size in sorted([(at, other.size) for at, other in placed if other.first <= last and first <= other.last]):
            if start - offset >= block.size:
                break
            offset = max(offset, start + size)
        placed.append((offset, block))
    at = {name: offset for offset, block in placed for name in block.names}
    live = [0] * len(demand.steps)
    for _, block in placed:
        for i in range(block.first, min(block.last + 1, len(live))):
            live[i] += block.size
    pairs = [step.tiles[choice[i]] for i, step in enumerate(demand.steps)]
    return Plan(
        arena_bytes=max((offset + block.size for offset, block in placed), default=0),
        offsets={name: at[name] for name in names},
        scratch=tuple((at.get(f"scratch of {i}", 0), size) for i, (_, size) in enumerate(pairs)),
        tiles=tuple(tile for tile, _ in pairs),
        live=tuple(live),
        overlaid=dict(overlaid),
        order=order,
    )


def _narrower(demand: Demand, found: Plan, choice: Sequence[int], limit: int) -> list[int]:
    """The next choice of tiles to try; empty if no smaller one can help."""
    chosen = list(choice)
    for i, step in enumerate(demand.steps):  # whatever the offsets, a step needs its live bytes
        rest = found.live[i] - _up(step.tiles[chosen[i]][1])
        while rest + _up(step.tiles[chosen[i]][1]) > limit and chosen[i] + 1 < len(step.tiles):
            chosen[i] += 1
        if rest + _up(step.tiles[chosen[i]][1]) > limit:
            return []
    if chosen != list(choice):
        return chosen
    # every step fits by itself and only gaps are in the way: take from the step that needs most
    for i in sorted(range(len(chosen)), key=lambda i: (-found.live[i], i)):
        if chosen[i] + 1 < len(demand.steps[i].tiles):
            chosen[i] += 1
            return chosen
    return []


def _too_large(demand: Demand, limit: int, overlay: bool) -> str:
    least = place(demand, [len(step.tiles) - 1 for step in demand.steps], overlay=overlay)
    step, tile = demand.steps[least.peak], least.tiles[least.peak]
    at = f"`{step.name}`" + (f" with its smallest tile, {tile}," if len(step.tiles) > 1 else "")
    return (
        f"the arena does not fit: {least.arena_bytes:,} bytes of {limit:,}, {least.arena_bytes - limit:,} too many; "
        f"the peak is at {at} where {least.live[least.peak]:,} bytes are in use"
    )


def _up(size: int) -> int:
    return -(-size // ALIGN) * ALIGN

"""Memory plans of random programs are played byte by byte; known programs have known arenas."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from nascompile.errors import BudgetError
from nascompile.mcu.plan_check import faults
from nascompile.mcu.planner import ALIGN, Demand, Step, place, plan, with_tiles


def random_demand(seed: int) -> Demand:
    """A program of up to twelve steps: several readers of a tensor, dead results, overlays that may and may not be taken, tiles."""
    rng = np.random.default_rng(seed)
    sizes = {"in": int(rng.integers(1, 200))}
    steps = []
    for i in range(int(rng.integers(1, 13))):
        known = list(sizes)
        reads = tuple(rng.choice(known, size=min(len(known), int(rng.integers(1, 4)))))  # the same one twice among them
        writes = tuple(f"t{i}.{j}" for j in range(int(rng.integers(1, 3))))
        overlays = []
        for name in writes:
            source = str(rng.choice(reads))
            sizes[name] = sizes[source] if rng.random() < 0.6 else int(rng.integers(1, 200))
            if rng.random() < 0.7:
                overlays.append((source, name))
        scratch = sorted({int(s) for s in rng.integers(0, 150, size=int(rng.integers(1, 4)))}, reverse=True)
        tiles = tuple((len(scratch) - k, size) for k, size in enumerate(scratch))
        steps.append(Step(f"s{i}", tuple(map(str, reads)), writes, tuple(overlays), tiles))
    names = [name for name in sizes if name != "in"]
    outputs = tuple(dict.fromkeys(map(str, rng.choice(names, size=int(rng.integers(1, 3))))))
    return Demand(sizes, tuple(steps), ("in",), outputs)


@pytest.mark.parametrize("seed", range(150))
@pytest.mark.parametrize("overlay", [True, False])
def test_random_programs_keep_every_byte(seed, overlay):
    demand = random_demand(seed)
    found = plan(demand, overlay=overlay)
    assert faults(demand, found) == []
    assert max(found.live) <= found.arena_bytes  # nothing can be smaller than what is in use at once
    assert found.arena_bytes % ALIGN == 0
    assert found.overlaid == {} or overlay


@pytest.mark.parametrize("seed", range(150))
def test_a_limit_is_kept_or_said_to_be_too_low(seed):
    demand = random_demand(seed)
    least, most = plan(demand, smallest=True).arena_bytes, plan(demand).arena_bytes
    limit = int(np.random.default_rng((seed, 1)).integers(8, most + 50))
    if least > limit:
        with pytest.raises(BudgetError, match=f"{least:,} bytes of {limit:,}, {least - limit:,} too many"):
            plan(demand, limit)
        return
    found = plan(demand, limit)
    assert found.arena_bytes <= limit
    assert faults(demand, found) == []


def test_tiles_shrink_only_where_they_must():
    wide, narrow = (8, 800), (1, 100)
    steps = (Step("a", ("in",), ("x",), tiles=(wide, (4, 400), narrow)), Step("b", ("x",), ("y",), tiles=(wide, narrow)))
    demand = Demand({"in": 80, "x": 640, "y": 80}, steps, ("in",), ("y",))
    assert plan(demand).tiles == (8, 8)
    assert plan(demand, 1520).tiles == (8, 8)  # 80 + 640 + 800
    assert plan(demand, 1519).tiles == (4, 1)
    assert plan(demand, smallest=True).tiles == (1, 1)
    with pytest.raises(BudgetError, match="824 bytes of 819, 5 too many; the peak is at `a` with its smallest tile, 1,"):
        plan(demand, 819)


def chain() -> Demand:
    """in ▸ x ▸ y ▸ out, each 100 bytes, each step able to work in place; x is read again at the end."""
    overlays = ((("in", "x"),), (("x", "y"),), (("y", "out"),))
    steps = tuple(Step(f"s{i}", (pair[0][0],), (pair[0][1],), pair) for i, pair in enumerate(overlays))
    steps = (*steps[:2], replace(steps[2], reads=("y", "x")))
    return Demand(dict.fromkeys(("in", "x", "y", "out"), 100), steps, ("in",), ("out",))


def test_overlays_where_nobody_needs_what_is_replaced():
    found = plan(chain())
    assert found.overlaid == {"x": "in", "out": "y"}  # not y over x, which is read later
    assert found.arena_bytes == 2 * 104
    assert plan(chain(), overlay=False).arena_bytes == 3 * 104


def test_a_result_smaller_than_what_it_could_replace_gets_a_place_of_its_own():
    demand = Demand({"in": 100, "x": 50}, (Step("s", ("in",), ("x",), (("in", "x"),)),), ("in",), ("x",))
    assert plan(demand).overlaid == {}


def test_what_a_step_reads_twice_is_not_replaced():
    """A convolution onto its own input: windows that come later still read it."""
    demand = Demand({"in": 64, "x": 64}, (Step("s", ("in", "in"), ("x",), (("in", "x"),)),), ("in",), ("x",))
    found = plan(demand)
    assert found.overlaid == {}
    bad = replace(found, offsets={"in": 0, "x": 0}, overlaid={"x": "in"})
    assert any("writes x over in, which it reads" in line for line in faults(demand, bad))


def test_the_better_of_two_orders_is_kept():
    orders = {plan(random_demand(seed), overlay=False).order for seed in range(60)}
    assert orders == {"size", "time"}


def test_chosen_tiles():
    steps = (Step("a", ("in",), ("x",), tiles=((8, 800), (4, 400), (1, 100))),)
    demand = Demand({"in": 8, "x": 8}, steps, ("in",), ("x",))
    assert with_tiles(demand, {"a": 4}).arena_bytes == 416
    with pytest.raises(BudgetError, match="no tile 5") as caught:
        with_tiles(demand, {"a": 5})
    assert caught.value.hint == "its tiles: 8, 4, 1"
    with pytest.raises(BudgetError, match="816 bytes of 500, 316 too many") as caught:
        with_tiles(demand, {"a": 8}, 500)
    assert caught.value.hint == "tiles that fit (416 bytes): a 4"
    with pytest.raises(BudgetError, match="unknown operators: b"):
        with_tiles(demand, {"b": 1})


@pytest.mark.parametrize("fault", ["moved", "misaligned", "outside", "read over", "scratch", "wrong scratch", "lost at the end"])
def test_the_checker_sees_broken_plans(fault):
    first = Step("a", ("in",), ("x",), (("in", "x"),), ((1, 16),))
    steps = (first, Step("b", ("x",), ("y",), tiles=((2, 8), (1, 4))), Step("c", ("x", "y"), ("z",)))
    demand = Demand({"in": 32, "x": 32, "y": 24, "z": 8}, steps, ("in",), ("z", "y"))
    good = plan(demand)
    assert faults(demand, good) == []
    at = dict(good.offsets)
    bad, says = {
        "moved": (replace(good, offsets=at | {"y": at["x"] + 8}), "over x, which it reads"),
        "misaligned": (replace(good, offsets=at | {"z": at["z"] + 1}, arena_bytes=good.arena_bytes + 8), "no multiple"),
        "outside": (replace(good, arena_bytes=good.arena_bytes - 8), "outside the arena"),
        "read over": (replace(good, overlaid={}), "writes x over in"),
        "scratch": (replace(good, scratch=((at["x"], 16), *good.scratch[1:])), "scratch over x"),
        "wrong scratch": (replace(good, tiles=(1, 1, 0)), "8 bytes of scratch for tile 1"),
        "lost at the end": (replace(good, offsets=at | {"z": at["y"]}), "of y are lost"),
    }[fault]
    assert any(says in line for line in faults(demand, bad)), faults(demand, bad)


def test_programs_that_make_no_sense():
    with pytest.raises(ValueError, match="reads y, which nothing has written"):
        place(Demand({"in": 1, "y": 1}, (Step("s", ("y",), ()),), ("in",)), [0])
    with pytest.raises(ValueError, match="writes in again"):
        place(Demand({"in": 1}, (Step("s", (), ("in",)),), ("in",)), [0])
    with pytest.raises(ValueError, match="nothing writes the output z"):
        place(Demand({"in": 1, "z": 1}, (Step("s", ("in",), ()),), ("in",), ("z",)), [0])

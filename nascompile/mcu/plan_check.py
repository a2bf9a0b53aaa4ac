"""Whether a memory plan can be right: the program is played step by step, byte by byte, and every read must find what was written.

Shares no code with the planner: no lifetimes, no intervals. A byte remembers who wrote it last.
"""

from __future__ import annotations

from nascompile.mcu.planner import ALIGN, Demand, Plan

FREE = -1


def faults(demand: Demand, plan: Plan) -> list[str]:
    """What is wrong with a plan, in order of execution; empty if nothing is."""
    names = list(demand.sizes)
    memory = [FREE] * plan.arena_bytes
    found: list[str] = []

    def place_of(name: str) -> range:
        return range(plan.offsets[name], plan.offsets[name] + demand.sizes[name])

    def check_place(what: str, place: range) -> bool:
        inside = place.start >= 0 and place.stop <= plan.arena_bytes
        if not inside:
            found.append(f"{what} lies at {place.start}..{place.stop}, outside the arena of {plan.arena_bytes} bytes")
        if place.start % ALIGN:
            found.append(f"{what} lies at {place.start}, which is no multiple of {ALIGN}")
        return inside

    def write(what: str, place: range, owner: int) -> None:
        if check_place(what, place):
            for address in place:
                memory[address] = owner

    def check_held(when: str, name: str) -> None:
        lost = [address for address in place_of(name) if not 0 <= address < len(memory) or memory[address] != names.index(name)]
        if lost:
            found.append(f"{when}, {len(lost)} bytes of {name} are lost, the first at {lost[0]}")

    for name in demand.inputs:
        write(name, place_of(name), names.index(name))
    for i, step in enumerate(demand.steps):
        scratch = range(plan.scratch[i][0], plan.scratch[i][0] + plan.scratch[i][1])
        if plan.scratch[i] != (scratch.start, dict(step.tiles)[plan.tiles[i]]):
            found.append(f"step {step.name} has {plan.scratch[i][1]} bytes of scratch for tile {plan.tiles[i]}")
        for name in step.reads:
            check_held(f"when {step.name} begins", name)
        # while the step runs nothing it reads may be overwritten, unless it says that it can bear it; what it reads twice may never be
        bears = {write: read for read, write in step.overlays if plan.overlaid.get(write) == read and step.reads.count(read) == 1}
        busy: dict[int, str] = {}
        for name in dict.fromkeys(step.reads):
            busy |= dict.fromkeys(place_of(name), name)
        for name in step.writes:
            for address in place_of(name):
                other = busy.get(address, "")
                if other and not (bears.get(name) == other and plan.offsets[name] == plan.offsets[other]):
                    found.append(f"step {step.name} writes {name} over {other}, which it reads")
                    break
            busy |= dict.fromkeys(place_of(name), name)
        if any(address in busy for address in scratch):
            found.append(f"step {step.name} has scratch over {busy[next(address for address in scratch if address in busy)]}")
        write(f"scratch of {step.name}", scratch, FREE)
        for name in step.writes:
            write(name, place_of(name), names.index(name))
    for name in demand.outputs:
        check_held("at the end", name)
    return found

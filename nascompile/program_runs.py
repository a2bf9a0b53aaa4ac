"""What a run for a microcontroller does otherwise than one for a runtime: what it refuses, what bounds it, what scores, what is built."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nascompile import plugins, programs, targets
from nascompile.errors import UnsupportedError
from nascompile.families import Family
from nascompile.program_costs import Chip, Taken, is_program
from nascompile.records import INT8, Target
from nascompile.settings import Recipe

COUNTED = "qemu_m7"
"""Kind of the devices that a table can be counted for."""
AGREEMENT_SAMPLES = 256
"""Of validation, on which emulated and built networks are compared: a PC is slow at a microcontroller's integers."""


def check(recipe: Recipe, found: Sequence[Target], backends: Sequence[Any]) -> None:
    """UnsupportedError, before any work, for what a run for a microcontroller cannot do."""
    chips = [target for target, backend in zip(found, backends, strict=True) if is_program(backend)]
    if not chips:
        return
    [first, *others], backend = found, backends[found.index(chips[0])]
    if others:
        named = " and ".join(f"`{target.device}`" for target in found)
        raise UnsupportedError(
            f"a search for {named} together is not there yet: programs for the microcontroller `{chips[0].device}` are scored otherwise",
            hint="search for each alone",
        )
    if reason := backend.unavailable():
        raise UnsupportedError(f"nothing can be built for `{first.device}` here: {reason}")
    kind = targets.load_profile(first.device).kind
    if kind != COUNTED:
        raise UnsupportedError(
            f"operators are counted in QEMU, and `{first.device}` is of kind {kind}",
            hint=f'search with a profile of the same board with kind = "{COUNTED}", then build one of its candidates: '
            f"`nascompile build RUN --candidate N --device {first.device}`",
        )
    check_variants(recipe, first)
    if INT8.name not in recipe.search.precisions:
        asked = ", ".join(recipe.search.precisions) or "none"
        raise UnsupportedError(
            f"programs for `{first.device}` are whole in {INT8.name}: search.precisions are {asked}",
            hint=f'search.precisions = ["{INT8.name}"]',
        )


def check_variants(recipe: Recipe, target: Target) -> None:
    """UnsupportedError where engines were to be chosen among variants: there is one way to build for a microcontroller."""
    if recipe.backend == targets.AUTO or recipe.measure.tune_session:
        what = f"--backend {targets.AUTO}" if recipe.backend == targets.AUTO else "--tune-session"
        raise UnsupportedError(f"{what} compares ways to run an engine; for `{target.device}` there is one", hint=f"leave {what} out")


def check_family(family: Family, backend: Any) -> None:
    """UnsupportedError for a model whose networks have no program."""
    if is_program(backend) and family.name not in programs.FAMILIES:
        raise UnsupportedError(
            f"no microcontroller program for the family {family.name}", hint=f"families with one: {', '.join(programs.FAMILIES)}"
        )


def too_large(taken: Taken, chip: Chip) -> str:
    """Why the device cannot hold a network; empty if it can."""
    there = (("RAM", taken.ram, chip.board.ram_bytes), ("flash", taken.flash, chip.board.flash.size))
    over = " and ".join(f"{used:,} bytes of {name}, {limit:,} there" for name, used, limit in there if used > limit)
    return taken.refused or over


def planned(recipe: Recipe) -> dict[str, str]:
    """Stage ▸ what it does for a microcontroller, where that is not what it does otherwise; empty for another device."""
    known = targets.load_profile(recipe.device).backends if recipe.device in targets.names() else ()
    names = (recipe.backend, *known)
    named = [name for name in names if name in plugins.names("backends")]
    if not named or not is_program(plugins.get("backends", named[0])):
        return {}
    engines = recipe.measure.top_k
    return {
        "profile": f"count every operator of the space in QEMU for `{recipe.device}`, unless a table of these sources is known",
        "build": f"{engines} engines and the uniform INT8 one if that fits: C projects, their bytes proved equal here and in QEMU",
        "measure": "instructions counted, latency modelled from them, RAM, flash, stack, accuracy by the engines' bytes",
    }

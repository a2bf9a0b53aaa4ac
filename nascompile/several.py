"""A search for several devices: which they are, what bounds each, which can run here and where the latencies of the rest come from."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nascompile import latency_table, plugins, targets
from nascompile.errors import RecipeError, TableError, UnsupportedError
from nascompile.latency_table import Found
from nascompile.records import Environment, Operator, Target, Workload
from nascompile.settings import Recipe
from nascompile.targets import label


@dataclass(frozen=True)
class Further:
    """A device of a search after the first."""

    target: Target
    absent: str
    """Why its engines cannot run here, so that predictions of a stored table stand for measurements; empty: they can."""
    kit: str
    """Command that writes a kit with the operators that a table of it needs for this search."""

    @property
    def backend(self) -> Any:
        return plugins.get("backends", self.target.backend)

    @property
    def label(self) -> str:
        return label(self.target)

    @property
    def transport(self) -> str:
        """How it is reached where it is not here but has an ssh server; its table is then made and tried there."""
        return targets.load_profile(self.target.device).transport

    @property
    def file(self) -> str:
        """Name of its files and folders in a run."""
        return f"{self.target.device}-{self.target.backend}-t{self.target.threads}"

    @property
    def environment(self) -> Environment:
        """Of this machine, for one that runs here."""
        return environment_of(self.target)

    def table(self, operators: Sequence[Operator], explicit: Path | None) -> Found:
        """The stored table of one that is absent; TableError if there is none that has every operator."""
        found = latency_table.stored(self.target, operators, explicit)
        if found is None:
            here = latency_table.of_device(self.target, explicit)
            raise TableError(
                f"no latency table of `{self.label}` fits this model and these sources, and it cannot run here: {self.absent}",
                detail="\n".join(f"{path}: {latency_table.unfit(table.target, self.target)}" for path, table in here),
                hint=f"make one on that device: `{self.kit}`, then `nascompile kit import`",
            )  # fmt: skip
        if found.missing:
            raise TableError(
                f"the latency table of `{self.label}` lacks {len(found.missing)} of the network's operators, and it cannot run here: "
                + self.absent,
                detail="\n".join((str(found.path), *(operator.label for operator in found.missing))), hint=self._hint(found.missing),
            )  # fmt: skip
        return found

    def _hint(self, missing: Sequence[Operator]) -> str:
        integers = any(operator.precision.accumulation.kind == "int" for operator in missing)
        vnni = " --processor vnni" if integers and self.target.backend == "openvino" else ""  # which has no form for processors without
        return f"a kit of this search, with the widths that its devices share: `{self.kit}{vnni}`, then `nascompile kit import`"


def environment_of(target: Target) -> Environment:
    """Of this machine, for a target that runs here."""
    found: Environment = targets.device(target.device).environment(target, plugins.get("backends", target.backend).versions())
    return found


def further(recipe: Recipe, first: Target, run: Path | None = None) -> tuple[Further, ...]:
    """The devices that a recipe names after the first; `run`: the folder that holds the recipe and what the data says."""
    explicit, found = tables_folder(recipe), targets.several(first, recipe.also)
    return tuple(Further(target, _absence(target, explicit), _kit(recipe, target, found, run)) for target in found[1:])


def others(recipe: Recipe, named: targets.Named) -> tuple[Target, tuple[str, ...]] | None:
    """The target of a recipe that is meant, and the names of those it is searched together with; None if none is."""
    found = targets.several(targets.make(recipe.device, recipe.backend, Workload(), recipe.threads), recipe.also)
    fitting = [target for target in found if named.fits(target)]
    if len(fitting) > 1:
        raise RecipeError(
            f"{named.device} may be any of {len(fitting)} devices of this run", hint=f"say which: {', '.join(map(label, fitting))}"
        )
    return (fitting[0], tuple(label(target) for target in found if target != fitting[0])) if fitting else None


def _kit(recipe: Recipe, target: Target, found: Sequence[Target], run: Path | None) -> str:
    """The command that exports a kit for one of the devices of a search."""
    words = ["nascompile", "kit", "export", *([str(run)] if run else ["--model", recipe.model]), "--device", label(target)]
    if run is None:  # which otherwise says so, and what labels there are and how long texts
        words += [word for other in found if other != target for word in ("--device", label(other))]
        words += ["--max-length", str(recipe.data.max_length)] * bool(recipe.data.max_length)
    return shlex.join([*words, "--out", "kit.zip"])


def tables_folder(recipe: Recipe) -> Path | None:
    """Where the recipe has tables looked for; one file is the first device's."""
    path = Path(recipe.tables) if recipe.tables else None
    return None if path is None or path.is_file() else path


def check(recipe: Recipe, first: Target) -> None:
    """RecipeError for a device named twice or a bound for none or no single one; TableError for one that nothing can be said of."""
    told = recipe.allow_foreign and bool(recipe.tables) and Path(recipe.tables).is_file()
    if not told and not targets.absence(first) and (reason := _elsewhere(first, tables_folder(recipe))):
        raise UnsupportedError(
            f"`{first.device}` is not this machine: {reason}",
            hint="to search with its table, name it: --tables FILE --allow-foreign; engines are then built and measured here. "
            "If it is this machine by now, remove those tables",
        )
    others = further(recipe, first)
    for other in others:
        if other.absent and not other.transport and not latency_table.of_device(other.target, tables_folder(recipe)):
            raise TableError(
                f"`{other.label}` cannot run here and has no latency table: {other.absent}",
                hint=f"make one on that device: `{other.kit}` (texts need --max-length, a new head --labels), then `nascompile kit import`",
            )
    found = (first, *(other.target for other in others))
    bounds = latencies(recipe, found)
    if "worst_ratio" in recipe.search.objectives and (without := [label(t) for t in found if t.id not in bounds]):
        raise RecipeError(
            f"the worst ratio to a budget needs a latency budget for every device: none for {', '.join(without)}",
            hint=" ".join(f"--latency-ms {name}=MS" for name in without),
        )


def latencies(recipe: Recipe, found: Sequence[Target]) -> dict[str, float]:
    """Target id ▸ bound in ms; RecipeError for a device that is not searched for, or bounded twice."""
    given = recipe.budgets.latency_ms
    if not isinstance(given, dict):
        return {} if given is None else {found[0].id: given}
    bounds: dict[str, float] = {}
    for text, bound in given.items():
        target = targets.find(text, found) if text else found[0]
        if target is None:
            raise RecipeError(
                f"a latency budget for a device that is not searched for: {text}", hint=f"this search is for {', '.join(map(label, found))}"
            )
        if target.id in bounds:
            raise RecipeError(f"two latency budgets for {label(target)}", detail=", ".join(given), hint="give one")
        bounds[target.id] = bound
    return bounds


def _absence(target: Target, explicit: Path | None) -> str:
    """Why engines for a target cannot run here; empty if they can.

    A profile does not say which machine it is of, its tables do: where all are of another processor, timing this one would be wrong.
    """
    return targets.absence(target) or _elsewhere(target, explicit)


def _elsewhere(target: Target, explicit: Path | None) -> str:
    """What tells this machine from that of all tables of a device that could run here; empty if nothing does."""
    if target.device in (targets.LOCAL, targets.SIMULATED):  # whatever machine it is
        return ""
    there = latency_table.machines(table for _, table in latency_table.of_device(target, explicit))
    here = latency_table.machine(environment_of(target))
    return f"its tables were taken on {', '.join(there)}, this is {here}" if there and here not in there else ""

"""Variants of one engine, run side by side: the backend that builds it, then the session settings it runs with.

Backends are compared by interleaved calls, as engines are when one is chosen. A setting must win by more than noise: it is
adopted if the interval of its latency over that of what was kept until then lies below `MARGIN`.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from nascompile.backends import Backend
from nascompile.devices import Device, Job
from nascompile.errors import NascompileError, UnsupportedError
from nascompile.records import Interval, Precision, Quantity, Target, Variant

BACKEND_SECONDS = 1.0
"""Timing per backend, all of them interleaved."""
SCREEN_SECONDS = 0.2
"""Timing per setting in the one window that says which are worth a second look."""
PROMISING = 1.0
"""Of the latency of the session as it came: settings that look slower than this in the first window are left at that."""
FINALISTS = 3
"""Settings at most that get a second look, the fastest first."""
BLOCKS, BLOCK_SECONDS = 6, 0.5
"""Windows of two jobs each that a second look takes; each gives one ratio. Both sessions are loaded anew for every window: of ten
with the same settings, timed side by side on a busy machine, one stood 2 to 4 % apart from the others."""
T975 = 2.571
"""97.5 % point of Student's t for `BLOCKS` − 1 degrees of freedom: a 95 % interval of the ratios' geometric mean."""
MARGIN = 0.98

Option = tuple[str, str]
"""A session setting and a value for it."""


@dataclass(frozen=True)
class Contender:
    """A backend an engine could be built with."""

    target: Target
    backend: Backend
    lower: Callable[[], Any]
    """Makes the form that the backend accepts."""
    predicted: Interval | None = None


@dataclass(frozen=True)
class Check:
    """Inputs, and the logits that every variant must give for them."""

    inputs: Mapping[str, Any]
    logits: Any
    tolerance: float


@dataclass(frozen=True)
class Built:
    """A contender's files and what runs them."""

    contender: Contender
    folder: Path
    graphs: tuple[str, ...]
    runner: Any


def choose(
    contenders: Sequence[Contender], precisions: Sequence[Precision], check: Check, inputs: Mapping[str, Any], device: Device,
    scratch: Path, seed: int,
) -> tuple[Built, tuple[Variant, ...]]:  # fmt: skip
    """The contender whose calls on `inputs` take least, built in `scratch`, and what came of all; UnsupportedError if none can run."""
    built: list[Built] = []
    tried: dict[Target, Variant] = {}
    for contender in contenders:
        found, reason = _built(contender, precisions, check, scratch / contender.backend.name)
        tried[contender.target] = Variant(backend=contender.backend.name, session=contender.target.session, reason=reason)
        built += [found] if found else []
    if not built:
        raise UnsupportedError(
            "no backend that runs here can build the engine", detail="\n".join(f"{v.backend}: {v.reason}" for v in tried.values())
        )
    jobs = [Job(b.contender.backend.name, b.runner, inputs) for b in built]
    latencies = device.time(jobs, seconds=BACKEND_SECONDS * len(jobs), seed=seed)
    best = min(range(len(built)), key=lambda i: (latencies[i].value, i))  # in a tie, the search's own backend
    for i, (b, latency) in enumerate(zip(built, latencies, strict=True)):
        slower = latency.value / latencies[best].value
        tried[b.contender.target] = Variant(
            backend=b.contender.backend.name, session=b.contender.target.session, latency=latency, predicted=b.contender.predicted,
            kept=i == best, reason="" if i == best else f"{slower:.2f} times the latency of {built[best].contender.backend.name}",
        )  # fmt: skip
    return built[best], tuple(tried.values())


def _built(contender: Contender, precisions: Sequence[Precision], check: Check, folder: Path) -> tuple[Built | None, str]:
    """The contender built and run once, or why it is out."""
    backend = contender.backend
    for precision in precisions:
        if reason := backend.supports(precision):
            return None, f"cannot run {precision.name}: {reason}"
    folder.mkdir(parents=True)
    try:
        graphs = backend.build(contender.lower(), contender.target, folder)
        runner = backend.load(folder, graphs, contender.target)
        reason = _off(runner, check)
    except Exception as error:  # whatever a runtime raises, the others are not to suffer for it
        return None, f"fails: {_said(error)}"
    return (None, reason) if reason else (Built(contender, folder, graphs, runner), "")


def _said(error: Exception) -> str:
    """An error in one line; a full disk is no fault of the variant and is raised."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise error
    text = error.message if isinstance(error, NascompileError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:300]


def _off(runner: Any, check: Check) -> str:
    """How far the logits are off, if they are."""
    found = np.asarray(next(iter(runner.run(check.inputs).values())), np.float64)
    if found.shape != check.logits.shape:
        return f"its logits have shape {found.shape}, expected {check.logits.shape}"
    difference = float(np.abs(found - check.logits).max(initial=0.0))
    if difference <= check.tolerance:  # NaN is not
        return ""
    return f"its logits are off by {difference:.3g} on the sample, accepted is {check.tolerance:.3g}"


def describe(tried: Sequence[Variant]) -> str:
    """What was kept and what was not, in a line."""
    backends = [v for v in tried if not v.setting]
    settings = [v for v in tried if v.setting]
    first = next(v for v in backends if v.kept)
    parts = [f"{first.backend} {_ms(first)}"]
    parts += [f"not {v.backend}: {_ms(v) if v.latency else v.reason}" for v in backends if v is not first]
    if settings:
        adopted = [f"{v.setting} × {v.ratio.value:.2f}" for v in settings if v.kept and v.ratio]
        parts.append(f"{', '.join(adopted) or 'none'} adopted of {len(settings)} session settings tried")
    return "; ".join(parts)


def _ms(variant: Variant) -> str:
    return f"{variant.latency.value:.3g} ms (n {variant.latency.n})" if variant.latency else "–"


# ---------------------------------------------------------------------------------------------- session settings


def tune(
    built: Built, check: Check, inputs: Mapping[str, Any], device: Device, seed: int, rounded: Check | None = None
) -> tuple[Target, tuple[Variant, ...]]:
    """The target with the session settings that measured better, one at a time, and every one that was tried.

    All are timed once beside the session as it is; the fastest of those that look better are timed again, each against what has
    been kept until then. `check` holds what the engine gives with its session as it is; `rounded` the same with what is accepted of
    settings that round another way (the backend's `rounding`), without which those are not tried.
    """
    target = built.contender.target
    rounding = dict(built.contender.backend.rounding) if rounded else {}
    checks = dict.fromkeys(rounding, rounded or check)
    runners, trials = _trials(built, (*built.contender.backend.tunable, *rounding.items()), check, checks)
    if not trials:
        return target, ()
    running = list(runners)
    again = built.contender.backend.load(built.folder, built.graphs, target)
    jobs = [Job("", runner, inputs) for runner in (built.runner, *runners.values(), again)]
    first, *found, last = device.time(jobs, seconds=SCREEN_SECONDS * len(jobs), seed=seed)
    times = {option: 2 * latency.value / (first.value + last.value) for option, latency in zip(running, found, strict=True)}
    for option, latency in zip(running, found, strict=True):
        reason = f"{times[option]:.2f} times the latency of the session as it came"
        trials[option] = msgspec.structs.replace(trials[option], latency=latency, reason=reason)
    promising = sorted((o for o in running if times[o] < PROMISING), key=lambda o: times[o])
    kept, adopted = target, set[str]()
    for option in promising[:FINALISTS]:
        if option[0] in adopted:
            trials[option] = msgspec.structs.replace(trials[option], reason=f"another value of {option[0]} was adopted before")
            continue
        other = _with(kept, *option)
        accepted = next((checks[name] for name in (option[0], *adopted) if name in checks), check)
        if adopted and (reason := _loaded(built, other, accepted)[1]):
            trials[option] = msgspec.structs.replace(trials[option], session=other.session, reason=reason)
            continue
        ratio, measured = _duel(built, kept, other, inputs, device, seed)
        wins = ratio.high < MARGIN
        trials[option] = msgspec.structs.replace(
            trials[option], session=other.session, latency=measured, ratio=ratio, kept=wins,
            reason="" if wins else f"not faster by more than {100 * (1 - MARGIN):.0f} % and noise",
        )  # fmt: skip
        if wins:
            kept = other
            adopted.add(option[0])
    return kept, tuple(trials.values())


def _trials(
    built: Built, settings: Sequence[tuple[str, tuple[str, ...]]], check: Check, checks: Mapping[str, Check]
) -> tuple[dict[Option, Any], dict[Option, Variant]]:
    """Runners for everything one setting could be instead, and a record of each, with a reason where it does not run."""
    target, backend = built.contender.target, built.contender.backend
    now = dict(target.session)
    runners, trials = {}, {}
    for option in [(name, value) for name, values in settings for value in values if value != now.get(name, values[0])]:
        other = _with(target, *option)
        runner, reason = _loaded(built, other, checks.get(option[0], check))
        trials[option] = Variant(backend=backend.name, session=other.session, setting="=".join(option), reason=reason)
        if runner is not None:
            runners[option] = runner
    return runners, trials


def _with(target: Target, name: str, value: str) -> Target:
    return msgspec.structs.replace(target, session=tuple(sorted((dict(target.session) | {name: value}).items())))


def _loaded(built: Built, target: Target, check: Check) -> tuple[Any, str]:
    """A runner with the target's session, or why there is none."""
    try:
        runner = built.contender.backend.load(built.folder, built.graphs, target)
        reason = _off(runner, check)
    except Exception as error:  # as above
        return None, f"fails: {_said(error)}"
    return (None, reason) if reason else (runner, "")


def _duel(
    built: Built, kept: Target, rival: Target, inputs: Mapping[str, Any], device: Device, seed: int
) -> tuple[Interval, Quantity]:  # fmt: skip
    """The rival's latency over that of what is kept, with its 95 % interval; and the rival's latency in the block that is in the middle."""
    blocks = []
    for i in range(BLOCKS):
        jobs = [Job("", built.contender.backend.load(built.folder, built.graphs, target), inputs) for target in (kept, rival)]
        blocks.append(device.time(jobs, seconds=BLOCK_SECONDS, seed=seed + 1 + i))
    logs = np.log([b.value / a.value for a, b in blocks])
    mean, half = float(logs.mean()), T975 * float(logs.std(ddof=1)) / math.sqrt(BLOCKS)
    ratio = Interval(value=math.exp(mean), low=math.exp(mean - half), high=math.exp(mean + half), unit="ratio", level=0.95)
    return ratio, sorted((b for _, b in blocks), key=lambda q: q.value)[BLOCKS // 2]

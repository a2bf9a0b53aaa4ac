"""Devices by name: their profiles, what can run here and why the rest cannot, and the target that a run is for."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from nascompile import places, plugins
from nascompile.backends import CrossCompiler
from nascompile.devices import Device
from nascompile.errors import NascompileError, RecipeError, UnsupportedError
from nascompile.records import Record, Target, Workload, write_atomic

LOCAL = "cpu"
"""The device that needs no profile: this machine."""
SIMULATED = "fake"
AUTO = "auto"
"""In place of a backend: engines are built with every one that runs here. What is searched and tabled is the first of them."""
MEMORY = '["0x20000000:327680"]'
"""How a profile says where a microcontroller's memory is."""


class DeviceProfile(Record, frozen=True):
    """`profiles/<name>.toml`, written by a person: what a device is; nothing measured."""

    kind: str
    """Plug-in of `devices/` that times on it."""
    backends: tuple[str, ...]
    """Backends that can build for it, the default first."""
    threads: int = 1
    """Threads of a session unless a run says otherwise. One is the default: it repeats best, and one process per core serves most."""
    ram_bytes: int = 0
    """0 where memory is no limit."""
    flash_bytes: int = 0
    clock_mhz: float = 0.0
    core: str = ""
    """Of a microcontroller, such as cortex-m7; session settings of what is built for it, as are the next two and the clock."""
    ram: tuple[str, ...] = ()
    """`ADDRESS:BYTES` of its memories, `ram_bytes` in all: the first for tensors, the last for stack and variables; often one is both."""
    flash: str = ""
    compute_capability: str = ""
    """Of an NVIDIA GPU, such as 8.9; a session setting of what is built for it."""
    description: str = ""
    transport: str = ""
    """`ssh://user@host[:port]` of a device that is not here; empty: it is."""
    python: str = "python3"
    """There, the interpreter that has NumPy and the runtime: a command, or a path from the home folder on."""
    session: dict[str, str] = msgspec.field(default_factory=dict)
    """Session settings of what runs on it, over the backend's own: `allow_spinning = "0"`."""


@dataclass(frozen=True)
class Address:
    """`ssh://user@host:port`; without a user or a port, what ssh's configuration says."""

    host: str
    user: str = ""
    port: int = 0

    def __str__(self) -> str:
        return f"{self.user}{'@' * bool(self.user)}{self.host}{f':{self.port}' if self.port else ''}"


@dataclass(frozen=True)
class Named:
    """A target as a person writes it, `NAME[:BACKEND[:THREADS]]`; what is left out is empty or 0."""

    device: str
    backend: str = ""
    threads: int = 0

    @classmethod
    def parse(cls, text: str) -> Named:
        """RecipeError for what is not of that form."""
        if not cls.is_one(text):
            raise RecipeError(f"not a device: {text!r}", hint="NAME[:BACKEND[:THREADS]], as pi4, cpu:openvino, cpu::2")
        device, backend, threads = (*text.split(":"), "", "")[:3]
        return cls(device, backend, int(threads or 0))

    @classmethod
    def is_one(cls, text: str) -> bool:
        """Whether a text is of that form."""
        return re.fullmatch(r"[^:\s]+(:[^:\s]*(:([1-9][0-9]{0,3})?)?)?", text) is not None

    def fits(self, target: Target) -> bool:
        """Whether it says nothing else than the target is."""
        return self.device == target.device and self.backend in ("", target.backend) and self.threads in (0, target.threads)


def label(target: Target) -> str:
    """What tells a target from the others of a search, as it may be written: `pi4:onnxruntime:1`."""
    return f"{target.device}:{target.backend}:{target.threads}"


def find(text: str, among: Sequence[Target]) -> Target | None:
    """The one target that is meant; None if none is, RecipeError if several are."""
    fitting = [target for target in among if Named.parse(text).fits(target)]
    if len(fitting) > 1:
        raise RecipeError(f"{text} may be any of {len(fitting)} devices of this run", hint=f"say which: {', '.join(map(label, fitting))}")
    return fitting[0] if fitting else None


def several(first: Target, also: Sequence[str], profiles: Path | None = None) -> tuple[Target, ...]:
    """The targets of a run, the first one's workload for all; RecipeError for one that is named twice."""
    found = [first]
    for named in map(Named.parse, also):
        if named.backend == AUTO:
            raise RecipeError(f"variants are compared for one device, not for {named.device}", hint=f"name a backend of {named.device}")
        target = make(named.device, named.backend, first.workload, named.threads, profiles=profiles)
        if target in found:
            raise RecipeError(f"the same device twice: {label(target)}", hint="another backend or other threads: NAME:BACKEND:THREADS")
        found.append(target)
    return tuple(found)


def absence(target: Target, profiles: Path | None = None) -> str:
    """Why engines for a target cannot run here; empty if they can."""
    profile = load_profile(target.device, profiles)
    kind = profile.kind
    if profile.transport:
        return f"it is reached over {profile.transport}"
    if kind not in plugins.names("devices"):
        return f"it is of kind {kind}, which nothing here can time"
    reason: str = plugins.get("devices", kind).unavailable() or _backend_reason(target.backend)
    return reason


@dataclass(frozen=True)
class KnownDevice:
    """A line of `nascompile devices`."""

    name: str
    kind: str
    backends: tuple[str, ...]
    runs_here: bool
    reason: str
    """What it is where it runs; why not where it does not."""


def make(
    device: str, backend: str, workload: Workload, threads: int = 0, session: Mapping[str, str] | None = None, profiles: Path | None = None
) -> Target:
    """The target of a run; empty `backend` and zero `threads` mean the profile's. Unknown or unfit names are refused."""
    profile = load_profile(device, profiles)
    if not profile.backends:
        raise UnsupportedError(f"no backend is installed that builds for {device}", hint="pip install 'nascompile[cpu]'")
    if backend == AUTO and profile.transport:
        raise UnsupportedError(f"`{device}` is not here, so none of its backends can be chosen by measuring", hint="name a --backend")
    chosen = runnable(device, profiles)[0] if backend == AUTO else backend or profile.backends[0]
    if chosen not in profile.backends:
        others = "" if profile.core else f"; or {AUTO}"
        raise UnsupportedError(f"`{device}` has no backend named {chosen}", hint=f"its backends: {', '.join(profile.backends)}{others}")
    if threads < 0:
        raise RecipeError(f"threads must be at least 1: {threads}", hint="leave it out for the device's default")
    if threads > 1 and profile.core:
        raise RecipeError(f"`{device}` has one core, so there are no {threads} threads", hint="leave --threads out")
    own = {"compute_capability": profile.compute_capability} if profile.compute_capability else {}
    own |= _board(device, profile)
    settings = dict(plugins.get("backends", chosen).session()) | own | profile.session | dict(session or {})
    ordered = tuple(sorted(settings.items()))
    return Target(device=device, backend=chosen, workload=workload, threads=threads or profile.threads, session=ordered)


def _board(device: str, profile: DeviceProfile) -> dict[str, str]:
    """Session settings of a microcontroller, none of another device; RecipeError for a profile that cannot be."""
    if not (profile.core or profile.ram or profile.flash):
        return {}
    if not profile.core:
        raise RecipeError(f"the profile of `{device}` does not say its core", hint='core = "cortex-m7"')
    if not profile.clock_mhz > 0:
        raise RecipeError(f"the profile of `{device}` does not say its clock_mhz: {profile.clock_mhz:g}", hint="clock_mhz = 216.0")
    memories = [_memory(device, text) for text in (*profile.ram, profile.flash)]
    if not profile.ram:
        raise RecipeError(f"the profile of `{device}` does not say its ram", hint=f"ram = {MEMORY}")
    ram, flash = sum(size for _, size in memories[:-1]), memories[-1][1]
    if (ram, flash) != (profile.ram_bytes, profile.flash_bytes):
        said = f"ram_bytes {profile.ram_bytes}, flash_bytes {profile.flash_bytes}"
        raise RecipeError(
            f"the profile of `{device}` contradicts itself: {said}, but its memories have {ram} and {flash}",
            hint=f"ram_bytes = {ram} and flash_bytes = {flash}, or other sizes in ram and flash",
        )
    ordered = sorted(memories)
    if shared := [(one, other) for one, other in pairwise(ordered) if sum(one) > other[0]]:
        (one, _), (other, _) = shared[0]
        raise RecipeError(
            f"memories of `{device}` overlap: that at 0x{one:08X} reaches that at 0x{other:08X}",
            hint="its reference manual has the memory map",
        )
    return {"core": profile.core, "clock_mhz": f"{profile.clock_mhz:g}", "ram": ",".join(profile.ram), "flash": profile.flash}


def _memory(device: str, text: str) -> tuple[int, int]:
    """(address, bytes) of `ADDRESS:BYTES`."""
    origin, _, size = text.partition(":")
    try:
        found = int(origin, 0), int(size, 0)
    except ValueError:
        found = -1, 0
    if found[0] < 0 or found[1] <= 0 or sum(found) > 1 << 32:
        raise RecipeError(
            f"a memory of `{device}` cannot be read: {text!r}",
            hint=f'ADDRESS:BYTES within 32 bits: ram = {MEMORY}, flash = "0x08000000:1048576"',
        )
    return found


def time_unit(target: Target) -> str:
    """Of its milliseconds: those of a microcontroller that is emulated follow from a model."""
    return "modelled ms" if "core" in dict(target.session) else "ms"


def runnable(device: str, profiles: Path | None = None) -> tuple[str, ...]:
    """Backends of a device that run here, its default first; UnsupportedError with every reason if none does."""
    reasons = {name: _backend_reason(name) for name in load_profile(device, profiles).backends}
    found = tuple(name for name, reason in reasons.items() if not reason)
    if not found:
        raise UnsupportedError(
            f"no backend that builds for `{device}` runs here, so none can be chosen by measuring",
            detail="\n".join(f"{name}: {reason}" for name, reason in reasons.items()),
            hint="pip install 'nascompile[cpu]'" if device == LOCAL else f"`nascompile devices` says more of `{device}`",
        )
    return found


def device(name: str, profiles: Path | None = None) -> Device:
    """The plug-in that times on a device; UnsupportedError if it cannot from here."""
    profile = load_profile(name, profiles)
    found: Device = plugins.get("devices", profile.kind)
    if profile.transport:
        raise UnsupportedError(
            f"`{name}` is reached over {profile.transport}: engines are neither built for it nor run on it from here",
            hint=f"`nascompile profile --device {name}` makes its latency table, `nascompile search` works with that",
        )
    if reason := found.unavailable():
        raise UnsupportedError(f"`{name}` cannot run here: {reason}", hint="`nascompile devices` says what can")
    return found


def address(transport: str) -> Address:
    """RecipeError for what is not `ssh://user@host[:port]`."""
    parts = urlsplit(transport)
    try:
        port = parts.port or 0
    except ValueError:
        port = -1
    plain = not (parts.path or parts.query or parts.fragment or parts.password)
    # ssh takes a word that begins with a hyphen for an option
    fine = all(re.fullmatch(r"[A-Za-z0-9_.:%][A-Za-z0-9_.:%-]*", word) for word in (parts.hostname or "", parts.username or "_"))
    if parts.scheme != "ssh" or not plain or port < 0 or not fine:
        raise RecipeError(f"not a transport: {transport}", hint='transport = "ssh://user@host" or "ssh://user@host:port"')
    return Address(parts.hostname or "", parts.username or "", port)


def load_profile(name: str, profiles: Path | None = None) -> DeviceProfile:
    """The profile of a device; UnsupportedError naming the known ones, RecipeError for a file that is not a profile."""
    path = _files(profiles).get(name)
    if path is not None:
        return _read(path)
    if name == LOCAL:
        return DeviceProfile(kind=LOCAL, backends=_local_backends(), description="this machine")
    raise UnsupportedError(
        f"unknown device: {name}",
        hint=f"known here: {', '.join(names(profiles))}; `nascompile devices --init {name}` writes a profile of this machine, "
        f"profiles/{name}.toml can describe another (a board: docs/microcontroller.md)",
    )


def names(profiles: Path | None = None) -> tuple[str, ...]:
    """Known device names, sorted, this machine first."""
    return (LOCAL, *sorted(set(_files(profiles)) - {LOCAL}))


def known(profiles: Path | None = None) -> tuple[KnownDevice, ...]:
    """Every known device; a profile that cannot be read is listed with the reason."""
    return tuple(_describe(name, profiles) for name in names(profiles))


def init_profile(name: str, profiles: Path | None = None) -> Path:
    """Write a profile of this machine under a name of its own; RecipeError if the name is taken or unfit for a file."""
    if not name or not name.replace("-", "").replace("_", "").isalnum():
        raise RecipeError(f"not a device name: {name!r}", hint="letters, digits, - and _")
    path = places.writable(places.PROFILES, profiles) / f"{name}.toml"
    if name in names(profiles) or path.exists():
        raise RecipeError(f"there is already a device named {name}", hint="choose another name, or edit its profile")
    local = load_profile(LOCAL, profiles)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    lines = [
        f"# {plugins.get('devices', LOCAL).describe()}",
        f'kind = "{LOCAL}"',
        f"backends = [{', '.join(f'{chr(34)}{backend}{chr(34)}' for backend in local.backends)}]",
        f"threads = {local.threads}",
        f"# a limit, if there is one; this machine has {memory:,} bytes",
        "ram_bytes = 0",
    ]
    write_atomic(path, ("\n".join(lines) + "\n").encode())
    return path


def _files(profiles: Path | None) -> dict[str, Path]:
    """Name ▸ file, the first folder of the look-up order winning."""
    found: dict[str, Path] = {}
    for folder in places.folders(places.PROFILES, profiles):
        for path in sorted(folder.glob("*.toml")):
            found.setdefault(path.stem, path)
    return found


def _read(path: Path) -> DeviceProfile:
    try:
        return msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), DeviceProfile)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise RecipeError(
            f"not a device profile: {path}", detail=str(error), hint=f"entries: {', '.join(DeviceProfile.__struct_fields__)}"
        ) from error


def _local_backends() -> tuple[str, ...]:
    """Backends that run on this processor, those installed first."""
    fitting = [name for name in plugins.names("backends") if LOCAL in getattr(plugins.get("backends", name), "devices", (LOCAL,))]
    fitting = [name for name in fitting if name != SIMULATED]
    return tuple(sorted(fitting, key=lambda name: (bool(plugins.get("backends", name).unavailable()), name)))


def _describe(name: str, profiles: Path | None) -> KnownDevice:
    try:
        profile = load_profile(name, profiles)
        plugin: Device = plugins.get("devices", profile.kind)
        _board(name, profile)
        if profile.transport:
            how = f"not here: `nascompile profile` reaches it by ssh as {address(profile.transport)}"
            return KnownDevice(name, profile.kind, profile.backends, False, how)
        reason = plugin.unavailable() or _backend_reasons(profile)
        if reason and (builders := _builders(name, profile, profiles)):
            reason += f"; {', '.join(builders)} can build for it here"
    except NascompileError as error:
        return KnownDevice(name, "?", (), False, error.message)
    return KnownDevice(name, profile.kind, profile.backends, not reason, reason or plugin.describe())


def _builders(name: str, profile: DeviceProfile, profiles: Path | None) -> list[str]:
    """Backends that build for the device although it is not here."""
    known = [b for b in profile.backends if b in plugins.names("backends") and isinstance(plugins.get("backends", b), CrossCompiler)]
    return [b for b in known if not plugins.get("backends", b).unbuildable(make(name, b, Workload(), profiles=profiles))]


def _backend_reason(name: str) -> str:
    """Why a backend cannot run here; empty if it can."""
    reason: str = plugins.get("backends", name).unavailable() if name in plugins.names("backends") else "not installed"
    return reason


def _backend_reasons(profile: DeviceProfile) -> str:
    """Why none of the profile's backends can run here; empty if one can."""
    reasons = {name: _backend_reason(name) for name in profile.backends}
    if not all(reasons.values()):
        return ""
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) or "no backend builds for it"

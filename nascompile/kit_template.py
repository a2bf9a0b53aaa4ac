#!/usr/bin/env python3
"""Times the graphs of this kit and leaves results.json, which `nascompile kit import` makes a latency table of.

    python3 run_kit.py            # time everything; run it again to go on after an interruption
    python3 run_kit.py --check    # load and run every graph once, time nothing

Needs Python 3.9, NumPy and the runtime that manifest.json names (onnxruntime or openvino), nothing else; nothing is installed and nothing
leaves this folder. Best on an idle machine, plugged in, at a steady clock.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import gc
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

try:
    import numpy as np
except ImportError:
    sys.exit("error: NumPy is not installed here\n\nhint: python3 -m pip install numpy")

HERE = Path(__file__).resolve().parent
JOURNAL, LOCK, RESULTS = "results.jsonl", "results.lock", "results.json"
RUNNING = 3
"""Exit status if another process is timing this kit."""
LEVELS = {"disabled": "ORT_DISABLE_ALL", "basic": "ORT_ENABLE_BASIC", "extended": "ORT_ENABLE_EXTENDED", "all": "ORT_ENABLE_ALL"}
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}


class KitError(Exception):
    """An expected failure: printed without a traceback, exit status 1."""


def main() -> int:
    """Exit status: 0; 1 for what cannot be run; 3 if it is running already; 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(description="Time the graphs of this kit.")
    parser.add_argument("--check", action="store_true", help="load and run every graph once, time nothing")
    parser.add_argument("--provider", choices=sorted(PROVIDERS), help="for --check: another than the kit's")
    parser.add_argument("--emulated", action="store_true", help="say in the results that this machine is emulated: its times are not real")
    arguments = parser.parse_args()
    try:
        kit = Kit(arguments.provider if arguments.check else "")
        kit.describe()
        if arguments.check:
            return check(kit)
        with Lock():
            return measure(kit, arguments.emulated)
    except KitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except AlreadyRunning:
        print("error: another process is timing this kit", file=sys.stderr)
        return RUNNING
    except KeyboardInterrupt:
        print("\ninterrupted; run it again to go on", file=sys.stderr)
        return 130


# ---------------------------------------------------------------------------------------------- the kit


class Kit:
    """The manifest, checked against the files, and the runtime that it asks for."""

    def __init__(self, provider: str = "") -> None:
        content = (HERE / "manifest.json").read_bytes()
        body = json.loads(content)
        if (body.get("record"), body.get("version")) != ("KitManifest", 1):
            raise KitError("manifest.json is not that of a kit")
        self.data: dict[str, Any] = body["data"]
        self.digest = hashlib.sha256(content).hexdigest()
        self.target: dict[str, Any] = {"threads": 1, "session": []} | self.data["target"]
        self.session = dict(self.target["session"])
        self.provider = provider or self.data["provider"]
        self.graphs = {graph["id"]: graph for graph in self.data["graphs"]}
        self.windows: list[dict[str, Any]] = self.data["windows"]
        self.check_files()
        self.runtime = self.load_runtime()
        self.check_processor()

    def check_files(self) -> None:
        damaged = []
        for path, sha, size in self.data["files"]:
            file = HERE / path
            if not file.is_file() or file.stat().st_size != size or hashlib.sha256(file.read_bytes()).hexdigest() != sha:
                damaged.append(path)
        if damaged:
            raise KitError(f"{len(damaged)} files of the kit are damaged or missing, such as {damaged[0]}\n\nhint: copy the kit again")

    def load_runtime(self) -> Any:
        install = f"{sys.executable} -m pip install {' '.join(self.data['packages'])}"
        name = self.target["backend"]
        try:
            runtime = __import__(name)
        except ImportError as error:
            raise KitError(f"{name} cannot be imported here: {error}\n\nhint: {install}") from error
        found = {name: runtime.__version__, "numpy": np.__version__, "python": platform.python_version()}
        for package, least in self.data["wanted"]:
            if numbers(found[package]) < numbers(least):
                raise KitError(f"{package} {found[package]} is too old for this kit: {least} is the first that will do\n\nhint: {install}")
        if name == "onnxruntime" and PROVIDERS[self.provider] not in runtime.get_available_providers():
            has = ", ".join(runtime.get_available_providers())
            raise KitError(f"onnxruntime has no {PROVIDERS[self.provider]} here, only {has}\n\nhint: {install}")
        if self.provider != "cpu" and hasattr(runtime, "preload_dlls"):
            runtime.preload_dlls()  # NVIDIA's libraries from where pip puts them, which no loader looks into
        return runtime

    @functools.cached_property
    def core(self) -> Any:
        """OpenVINO's, one for all graphs: after several have gone, signals such as Ctrl-C may find no stack to be handled on."""
        return self.runtime.Core()

    def check_processor(self) -> None:
        inexact = platform.machine().lower() in X86 and not {"avx512_vnni", "avx_vnni"} & set(self.isa())
        if self.data["integers"] == "u8s8" and inexact and self.provider == "cpu":
            raise KitError(
                "this kit's integer products are inexact on this processor, which has no VNNI\n\n"
                "hint: nascompile kit export --processor any"
            )

    def isa(self) -> list[str]:
        return isa(cpuinfo(), self.data["isa"])

    def versions(self) -> list[list[str]]:
        return [[self.target["backend"], package_version(self.target["backend"]) or self.runtime.__version__]]

    def device(self) -> list[list[Any]]:
        return device(self.data["provider"], self.data["isa"])

    def describe(self) -> None:
        runtime = ", ".join(" ".join(pair) for pair in self.versions())
        seconds = sum(window["seconds"] + expected_again(window) for window in self.windows)
        say(f"kit        {self.digest[:16]}, for {self.target['device']}: {len(self.graphs)} graphs in {len(self.windows)} windows")
        say(f"processor  {cpu_model(cpuinfo())}, {os.cpu_count()} cores, {' '.join(self.isa()) or 'no known instruction sets'}")
        if self.data["provider"] != "cpu" and self.provider != "cpu":
            say("gpu        {}, compute capability {}, CUDA {}".format(*gpu()))
        say(f"runtime    {runtime} ({self.provider}), {self.target['threads']} thread(s), Python {platform.python_version()}")
        say(f"timing     about {duration(seconds)}, loading the graphs not included")


def check(kit: Kit) -> int:
    """Run every graph once; 1 if an output is not finite."""
    wrong = []
    for number, name in enumerate(sorted(kit.graphs), 1):
        with tempfile.TemporaryDirectory() as scratch:
            outputs = load(kit, name, Path(scratch))()
        if not all(np.isfinite(np.asarray(output, np.float64)).all() for output in outputs):
            wrong.append(name)
        how = "NOT FINITE" if name in wrong else "runs" if kit.provider == "cpu" or alone(kit, name) else "runs, in part on the processor"
        say(f"[{number}/{len(kit.graphs)}] {label(kit.graphs[name])}: {how}")
    return 1 if wrong else 0


def alone(kit: Kit, name: str) -> bool:
    """Whether the kit's provider takes every node of a graph: onnxruntime leaves to the processor what another has no kernel for."""
    try:
        with tempfile.TemporaryDirectory() as scratch:
            load(kit, name, Path(scratch), strict=True)
    except KitError:
        return False
    return True


# ---------------------------------------------------------------------------------------------- timing all of it


def measure(kit: Kit, emulated: bool) -> int:
    """Every window that the journal lacks, one after the other; then results.json."""
    environment = {"device": kit.device(), "versions": kit.versions(), "recorded": recorded()}
    head = {"kit": kit.digest, "emulated": emulated, "device": environment["device"], "versions": environment["versions"]}
    done = read_journal(head)
    if done:
        say(f"going on after {len(done)} of {len(kit.windows)} windows")
    began, todo = time.monotonic(), [i for i in range(len(kit.windows)) if i not in done]
    left = sum(kit.windows[i]["seconds"] for i in todo)
    asked = left
    for i in todo:
        window = kit.windows[i]
        pace = (time.monotonic() - began) / (asked - left) if asked > left else 1.5  # loading and second timings come on top
        say(f"[{i + 1}/{len(kit.windows)}] {describe_window(kit, window)}; {duration(pace * left)} left")
        start = time.monotonic()
        first, again = timed_window(kit, window)
        done[i] = {"window": i, "seconds": time.monotonic() - start, "first": first, "again": again}
        append_journal(done[i])
        left -= window["seconds"]
    found = {
        "kit": kit.digest, "emulated": emulated, "environment": environment, "windows": [done[i] for i in range(len(kit.windows))],
        "seconds": sum(window["seconds"] for window in done.values()),
    }  # fmt: skip
    write_atomic(HERE / RESULTS, json.dumps({"record": "KitResults", "version": 1, "data": found}, allow_nan=False, indent=1))
    say(f"done: {HERE / RESULTS}")
    say("next: nascompile kit import results.json --kit THE_KIT, on the machine that has nascompile")
    return 0


def timed_window(kit: Kit, window: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Graph ▸ timing, the reference among them; and the same from a second timing if the first was disturbed."""
    with tempfile.TemporaryDirectory() as scratch:
        calls = {name: load(kit, name, Path(scratch)) for name in window["graphs"]}
        if window["reference"]:
            calls = {"reference": reference(kit, Path(scratch)), **calls}
        first = interleaved(kit, calls, window["seconds"], window["seed"], window["min_samples"])
        noisy = sum(noise(timing) > kit.data["method"]["noisy"] for timing in first.values())
        if not window["again_seconds"] or noisy <= kit.data["method"]["disturbed"] * len(first):
            return first, {}
        seconds = window["again_seconds"] * len(window["graphs"])
        return first, interleaved(kit, calls, seconds, window["seed"] + 1, window["min_samples"])


def reference(kit: Kit, scratch: Path) -> Any:
    """On a processor twenty products of 64 × 64 by NumPy, on a GPU a graph of the kit: no change of ours makes them faster."""
    if "reference" in kit.graphs:
        return load(kit, "reference", scratch)
    a = np.random.default_rng(0).standard_normal((64, 64), dtype=np.float32)
    out = np.empty_like(a)

    def call() -> None:
        for _ in range(20):
            np.matmul(a, a, out=out)

    return call


def interleaved(kit: Kit, calls: dict[str, Any], seconds: float, seed: int, min_samples: int) -> dict[str, Any]:
    """Name ▸ {n, quantiles in ms}."""
    method = kit.data["method"]
    samples = interleave(list(calls.values()), seconds, seed, min_samples, method, time.perf_counter)
    found = {}
    for name, values in zip(calls, samples):  # noqa: B905 (Python 3.9 has no `strict`)
        quantiles = np.quantile(np.asarray(values) * 1e3, method["levels"])
        found[name] = {"n": len(values), "quantiles": [list(pair) for pair in zip(method["levels"], quantiles.tolist())]}  # noqa: B905
    return found


def interleave(calls: list[Any], seconds: float, seed: int, min_samples: int, method: dict[str, Any], clock: Any) -> list[list[float]]:
    """Seconds per call: a list of samples for each call. As in nascompile's devices/interleave.py, where the reasons are."""
    rng = np.random.default_rng(seed)
    collecting = gc.isenabled()
    gc.disable()
    try:
        plans = [plan(call, method, clock) for call in calls]
        found: list[list[float]] = [[] for _ in calls]
        start, rounds = clock(), 0
        while not finished(clock() - start, rounds, found, seconds, min_samples, method):
            for i in rng.permutation(len(calls)):
                warm, samples, times = plans[i]
                for _ in range(warm):
                    calls[i]()
                found[i] += [timed(calls[i], times, clock) for _ in range(samples)]
            rounds += 1
        return found
    finally:
        if collecting:
            gc.enable()


def plan(call: Any, method: dict[str, Any], clock: Any) -> tuple[int, int, int]:
    """(unrecorded calls at the start of a visit, samples of a visit, calls of a sample)."""
    call()
    start, once = clock(), math.inf
    for number in range(1, method["most_warm"] + 1):
        once = max(min(timed(call, 1, clock), once), 1e-9)
        if number >= method["fewest_warm"] and clock() - start >= method["warm"]:
            break
    batch = max(1, math.ceil(method["sample"] / once))
    warm = min(method["most_warm"], max(method["fewest_warm"], math.ceil(method["warm"] / once)))
    return warm, max(1, round(method["visit"] / (once * batch))), batch


def timed(call: Any, times: int, clock: Any) -> float:
    start = clock()
    for _ in range(times):
        call()
    return float(clock() - start) / times


def finished(elapsed: float, rounds: int, found: list[list[float]], seconds: float, min_samples: int, method: dict[str, Any]) -> bool:
    if not found or (rounds and elapsed >= method["cap"] * seconds):
        return True
    return elapsed >= seconds and rounds >= method["rounds"] and min(map(len, found)) >= min_samples


def noise(timing: dict[str, Any]) -> float:
    """How far the median lies above the tenth percentile, as a fraction."""
    levels = dict(map(tuple, timing["quantiles"]))
    return float(levels[0.5] / levels[0.1] - 1) if levels[0.1] > 0 else math.inf


# ---------------------------------------------------------------------------------------------- loading a graph


def load(kit: Kit, name: str, scratch: Path, strict: bool = False) -> Any:
    """A function that runs the graph once and gives its outputs. `strict`: KitError if some of it would run on the processor."""
    graph = kit.graphs[name]
    folder = scratch / name
    folder.mkdir()
    for part in graph["parts"]:
        restore(part, folder, kit.data["seed"])
    inputs = {entry["name"]: drawn_input(entry, kit.data["seed"]) for entry in graph["inputs"]}
    first = folder / graph["parts"][0]["name"]
    try:
        call = openvino_call(kit, first, inputs) if kit.target["backend"] == "openvino" else onnxruntime_call(kit, first, inputs, strict)
    except Exception as error:  # each runtime has its own
        raise KitError(f"{kit.target['backend']} {kit.runtime.__version__} cannot load {label(graph)}\n  {error}") from error
    for part in graph["parts"]:
        with contextlib.suppress(OSError):  # Windows keeps what is mapped
            (folder / part["name"]).unlink()
    return call


def restore(part: dict[str, Any], folder: Path, seed: int) -> None:
    """Write a graph file, its weights drawn at random: speed does not depend on them."""
    rng = np.random.default_rng(seed)
    content, position, written = (HERE / part["path"]).read_bytes(), 0, 0
    with (folder / part["name"]).open("wb") as stream:
        for offset, count, kind, a, b in part["cuts"]:
            stream.write(content[position : position + offset - written])
            position += offset - written
            values = drawn(rng, count, kind, a, b)
            stream.write(memoryview(values))
            written = offset + values.nbytes
        stream.write(content[position:])
        written += len(content) - position
    if written != part["size_bytes"]:
        raise KitError(f"{part['path']} does not restore to {part['size_bytes']} bytes: {written}")


def drawn(rng: Any, count: int, kind: str, a: float, b: float) -> Any:
    if kind.startswith("float"):
        return (rng.standard_normal(count, dtype=np.float32) * np.float32(b) + np.float32(a)).astype(kind)
    return rng.integers(int(a), int(b), count, dtype=kind, endpoint=True)


def drawn_input(entry: dict[str, Any], seed: int) -> Any:
    rng, shape = np.random.default_rng(seed), entry["shape"]
    high = entry.get("high", 0)
    if entry["dtype"].startswith("float"):
        return rng.standard_normal(shape).astype(entry["dtype"])
    return rng.integers(0, high, shape).astype(entry["dtype"]) if high > 2 else np.ones(shape, entry["dtype"])


def onnxruntime_call(kit: Kit, path: Path, inputs: dict[str, Any], strict: bool = False) -> Any:
    ort, settings = kit.runtime, kit.session
    options = ort.SessionOptions()
    options.intra_op_num_threads = kit.target["threads"]
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, LEVELS[settings.get("graph_optimization_level", "all")])
    options.add_session_config_entry("session.intra_op.allow_spinning", settings.get("allow_spinning", "1"))
    if strict:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    options.enable_cpu_mem_arena = settings.get("enable_cpu_mem_arena", "1") == "1"
    options.enable_mem_pattern = settings.get("enable_mem_pattern", "1") == "1"
    disabled = [name for name in settings.get("disabled_optimizers", "").split(",") if name]
    extra: dict[str, Any] = {"trt_fp16_enable": "1", "trt_int8_enable": "1"} if kit.provider == "tensorrt" else {}
    wanted = PROVIDERS[kit.provider]
    session = ort.InferenceSession(str(path), options, providers=[(wanted, extra)], disabled_optimizers=disabled)
    if session.get_providers()[0] != wanted:  # onnxruntime goes on with the processor where a provider cannot start
        raise KitError(
            f"{wanted} could not be started; onnxruntime goes on with {', '.join(session.get_providers())}\n\n"
            "hint: its libraries (CUDA, cuDNN; TensorRT) must be found: put their folders into LD_LIBRARY_PATH"
        )
    names = [output.name for output in session.get_outputs()]
    return lambda: session.run(names, inputs)


def openvino_call(kit: Kit, path: Path, inputs: dict[str, Any]) -> Any:
    core = kit.core
    model = core.read_model(str(path))
    settings = {name.upper(): value.upper() for name, value in kit.session.items()}
    if "WORKLOAD" in settings.pop("STATIC_SHAPE", "WORKLOAD").split(","):
        model.reshape({name: list(array.shape) for name, array in inputs.items()})
    fixed = {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": kit.target["threads"]}
    request = core.compile_model(model, "CPU", {**fixed, **settings}).create_infer_request()
    return lambda: list(request.infer(inputs, share_inputs=True).values())


# ---------------------------------------------------------------------------------------------- what this machine is

def device(provider: str, names: dict[str, str]) -> list[list[Any]]:
    """What a table of this device must match, in the fields of nascompile's own devices."""
    if provider == "cpu":
        return [["cpu", cpu_model(cpuinfo())], ["isa", " ".join(isa(cpuinfo(), names))]]
    return [list(pair) for pair in zip(("gpu", "compute_capability", "driver"), gpu())]  # noqa: B905


def package_version(runtime: str) -> str:
    """Of the package that is imported; empty if none is installed. OpenVINO's own string has a build number that its package's lacks."""
    spec = importlib.util.find_spec(runtime)
    found: list[Any] = []
    for package in ("onnxruntime", "onnxruntime-gpu") if runtime == "onnxruntime" else (runtime,):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(importlib.metadata.distribution(package))
    if spec and spec.origin:  # of two in different folders, the one that is found first
        place = Path(spec.origin).resolve()
        found.sort(key=lambda one: Path(str(one.locate_file(f"{runtime}/__init__.py"))).resolve() != place)
    return found[0].version if found else ""


X86 = ("x86_64", "amd64", "i686", "x86")


def cpuinfo() -> dict[str, str]:
    """First processor's fields in lower case; empty where there is no /proc."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip().lower(): value.strip() for key, _, value in pairs}


def cpu_model(info: dict[str, str]) -> str:
    """Name with family, model and stepping: virtual machines give different processors one name."""
    if "model name" in info:
        return f"{info['model name']} ({'-'.join(info.get(key, '?') for key in ('cpu family', 'model', 'stepping'))})"
    if "cpu part" in info:
        return f"ARM implementer {info.get('cpu implementer')} part {info['cpu part']} variant {info.get('cpu variant')}"
    return sysctl("machdep.cpu.brand_string") or platform.processor() or platform.machine()


def isa(info: dict[str, str], names: dict[str, str]) -> list[str]:
    """Instruction sets that choose kernels, sorted."""
    flags = (info.get("flags") or info.get("features") or "").split()
    if not flags and platform.machine() == "arm64":
        features = (("asimddp", "DotProd"), ("i8mm", "I8MM"), ("bf16", "BF16"))
        flags = ["neon", *(flag for flag, key in features if sysctl(f"hw.optional.arm.FEAT_{key}") == "1")]
    return sorted({names[flag.lower()] for flag in flags if flag.lower() in names})


def sysctl(name: str) -> str:
    if platform.system() != "Darwin":
        return ""
    return subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=False).stdout.strip()


def gpu() -> tuple[str, str, str]:
    """(name, compute capability, newest CUDA version the driver knows) of the first NVIDIA GPU."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError as error:
        raise KitError(f"no CUDA device: {error}") from error
    device, version, name = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(128)
    statuses = [driver.cuInit(0), driver.cuDeviceGet(ctypes.byref(device), 0), driver.cuDeviceGetName(name, len(name), device)]
    statuses.append(driver.cuDriverGetVersion(ctypes.byref(version)))
    capability = []
    for attribute in (75, 76):  # major and minor
        value = ctypes.c_int()
        statuses.append(driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device))
        capability.append(str(value.value))
    if any(statuses):
        raise KitError(f"no CUDA device: the driver answers {next(filter(None, statuses))}")
    return name.value.decode(errors="replace"), ".".join(capability), f"{version.value // 1000}.{version.value % 1000 // 10}"


def recorded() -> list[list[Any]]:
    """What is only written down."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        memory = 0
    found: list[list[Any]] = [
        ["os", platform.system()], ["kernel", platform.release()], ["machine", platform.machine()], ["cores", os.cpu_count()],
        ["memory_bytes", memory], ["python", platform.python_version()], ["numpy", np.__version__],
    ]  # fmt: skip
    if hasattr(os, "getloadavg"):
        found.append(["load_average", round(os.getloadavg()[0], 2)])
    return found


# ---------------------------------------------------------------------------------------------- what is kept


class AlreadyRunning(Exception):
    """Another process holds the lock."""


class Lock:
    """One process at a time; the lock goes with the process, however that ends."""

    def __enter__(self) -> None:
        self.stream = (HERE / LOCK).open("w")
        try:
            import fcntl

            fcntl.flock(self.stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows: an open file cannot be locked twice there by this means, and nobody starts two by hand
            pass
        except OSError:
            raise AlreadyRunning from None

    def __exit__(self, *_: Any) -> None:
        self.stream.close()


def read_journal(head: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Window ▸ its entry; a torn last line is dropped. KitError if the journal is of another kit or machine."""
    path = HERE / JOURNAL
    if not path.is_file() or b"\n" not in path.read_bytes():
        path.write_text(json.dumps(head) + "\n", encoding="utf-8")
        return {}
    content = path.read_bytes()
    whole = content[: content.rindex(b"\n") + 1]
    if whole != content:
        write_atomic(path, whole.decode("utf-8"))
    lines = [json.loads(line) for line in whole.splitlines()]
    if lines[0] != head:
        changed = ", ".join(name for name in head if lines[0].get(name) != head[name])
        raise KitError(f"{JOURNAL} was begun with another {changed}\n\nhint: remove {path} to start over")
    return {entry["window"]: entry for entry in lines[1:]}


def append_journal(entry: dict[str, Any]) -> None:
    with (HERE / JOURNAL).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(entry, allow_nan=False) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def write_atomic(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.part")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


# ---------------------------------------------------------------------------------------------- words


def describe_window(kit: Kit, window: dict[str, Any]) -> str:
    if len(window["graphs"]) == 1:
        return label(kit.graphs[window["graphs"][0]])
    networks = sum(kit.graphs[name].get("candidate") is not None for name in window["graphs"])
    return f"{networks} whole networks" if networks else f"{len(window['graphs'])} operators"


def expected_again(window: dict[str, Any]) -> float:
    """Seconds of second timings: of a quarter of the graphs, say."""
    return float(window["again_seconds"] * len(window["graphs"]) / 4)


def label(graph: dict[str, Any]) -> str:
    operator = graph.get("operator")
    if operator and operator["kind"] == "call":
        return "a call of the runtime"
    if not operator:
        return f"network {graph['id']}" if graph.get("candidate") else "the reference"
    sizes = " ".join(f"{name}={size}" for name, size in operator["dims"])
    return f"{graph['repeat']} x {operator['kind']} {sizes} [{operator['precision']['name']}]"


def numbers(version: str) -> tuple[int, ...]:
    """Leading numbers of a version: `1.31.1` or `2026.0.0-20965`."""
    found = []
    for part in version.replace("-", ".").split(".")[:2]:
        if not part.isdigit():
            break
        found.append(int(part))
    return tuple(found)


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())

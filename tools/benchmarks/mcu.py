"""What networks for microcontrollers take: kernels, memory plans, and trained networks for two budgets, each beside its rivals.

    python tools/benchmarks/mcu.py --json
    python tools/benchmarks/mcu.py --cells kernels tvm plans
    python tools/benchmarks/mcu.py --cells fashion-320k fashion-64k --runs FOLDER

Needs gcc-arm-none-eabi and qemu-system-arm. Cells:
- `kernels`: every kernel from call to return, everything included, its bytes checked against its NumPy definition. `bar` is what other
  kernels took for the same work in the same emulator. On a Cortex-M7 and a Cortex-M4.
- `tvm`: Apache TVM's INT8 product of 32x192x192, its best schedule of several, counted in the same emulator. Installed from the package
  index into the cache, once; --tvm names a Python that has it. Where it cannot be installed, the reason is printed.
- `plans`: a vision transformer of 224 x 224 pixels, random weights, in three plans: every tensor in a place of its own, results over what
  they replace, fused operators. Each is built; one that the device has no room for, on a larger one.
- `fashion-320k`, `fashion-64k`: networks for 320 KB of SRAM and 1 MB of flash, and for 64 KB and 256 KB. FOLDER (--runs) holds the runs
  `searched-320k` and `searched-64k` of `nascompile run --device stm32f746` and `--device m7_64k` (whose profile is in this folder), and
  what mcu_rivals.py has trained: `hand-320k.safetensors`, `cnn-320k.safetensors`. Engines of a run's front that were built by number
  (`nascompile build RUN --candidate N`) are rows, too. What is not there is said.

Instructions are exact counts in QEMU; cycles and milliseconds are modelled from them; RAM and flash are the linker's. Accuracies of engines
are computed from their bytes on the whole test split, which are compared between this computer's build, QEMU and the NumPy interpreter on
--images of it. Everything is kept under --cache, by what it depends on, so a run that was stopped goes on; --fresh starts over.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from microcontroller import kernels, peer, plans

from nascompile.backends import mcu_c
from nascompile.mcu import board as boards, toolchain
from nascompile.records import digest, file_digest, write_atomic

HERE = Path(__file__).resolve().parent
CELLS = ("kernels", "tvm", "plans", "fashion-320k", "fashion-64k")
EXACT, MODELLED = "exact instructions in QEMU", f"modelled cycles: {boards.CYCLE_MODEL}"
LABELS = {
    "instructions": EXACT, "instructions_least": EXACT, "instructions_most": EXACT, "instructions_per_mac": EXACT,
    "instructions_per_element": EXACT, "figures": EXACT, "modelled_cycles": MODELLED,
    "modelled_ms": f"{MODELLED}; at the device's clock", "ram_bytes": "linker: arena, stack and variables",
    "flash_bytes": "linker: weights, code and harness", "arena_bytes": "linker: tensors and scratch",
    "stack_bytes_used": "deepest seen in QEMU", "accuracy_engine": "of the bytes that this computer's build gives for the test split",
    "accuracy_fp32": "of the float network on the test split",
}  # fmt: skip
"""What every column is."""


@dataclass(frozen=True)
class Bench:
    """Where results are kept, and how."""

    cache: Path
    runs: Path | None = None
    images: int = 1000
    jobs: int = 2
    tvm: str = ""

    def kept(self, name: str, depends: Sequence[Any], make: Callable[[], Any]) -> Any:
        """What was made of the same before, else what is made now."""
        path = self.cache / f"{name}-{digest(_code(), *depends)[:12]}.json"
        if path.is_file():
            return json.loads(path.read_bytes())
        print(f"{name} ...", file=sys.stderr, flush=True)
        began = time.monotonic()
        found = make()
        for old in self.cache.glob(f"{name}-{'?' * 12}.json"):
            old.unlink()
        write_atomic(path, json.dumps(found, indent=1).encode())
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        return found

    def cell(self, name: str) -> dict[str, Any]:
        """A cell's rows, figures and what is missing."""
        if name == "kernels":
            rows = self.kept(name, (), lambda: [row for core in kernels.run.CORES for row in kernels.measure(core, kernels.rows())])
            return {"rows": rows, "figures": kernels.figures(rows)}
        if name == "tvm":
            return self._tvm()
        if name == "plans":
            return {"rows": self.kept(name, (), lambda: plans.measure(self.jobs)), "device": plans.DEVICE}
        return self._networks(name.removeprefix("fashion-"))

    def _tvm(self) -> dict[str, Any]:
        if self.tvm and shutil.which(self.tvm) is None:
            raise SystemExit(f"error: no such program: {self.tvm}\n\nhint: --tvm names a Python that has apache-tvm")

        def make() -> list[dict[str, Any]]:
            return peer.measure(self.tvm or peer.python_of(self.cache.resolve() / "tvm"))

        try:
            rows = self.kept("tvm", (peer.PACKAGE, self.tvm), make)
        except peer.Absent as error:
            return {"rows": [], "figures": {}, "missing": [str(error)]}
        return {"rows": rows, "figures": peer.figures(rows)}

    def _networks(self, budget: str) -> dict[str, Any]:
        from microcontroller import networks  # which imports torch

        if self.runs is None:
            return {"rows": [], "missing": [f"networks for {budget}: --runs names the folder that has them"]}
        rows: list[Any] = []
        missing: list[str] = []
        for kind in networks.kinds(budget, self.runs):
            try:
                net = networks.found(kind, budget, self.runs, self.jobs)
            except networks.Missing as error:
                missing.append(str(error))
                continue
            folder = networks.data_folder(budget, self.runs)
            make = partial(networks.measure, net, folder, budget, self.images, self.jobs)
            rows.append(self.kept(net.name, (net.depends, self.images), make))
        return {"rows": rows, "missing": missing, "device": networks.DEVICES[budget]}


def _code() -> str:
    """Of what programs, projects and this tool are written in, and of the compilers."""
    own = [*sorted((HERE / "microcontroller").glob("*.py")), HERE / "mcu_rivals.py", *sorted((HERE / "profiles").glob("*.toml"))]
    own += [path for path in sorted(kernels.run.HERE.iterdir()) if path.is_file()]
    tools = [toolchain.version(name) for name in mcu_c.TOOLS]
    return digest(toolchain.sources_digest(), tools, [file_digest(path) for path in own])


# ---------------------------------------------------------------------------------------------- for people


def show(cells: Mapping[str, Mapping[str, Any]]) -> None:
    """The cells as text, every figure under what it is."""
    writers = {"kernels": _show_kernels, "tvm": _show_tvm, "plans": _show_plans}
    for name, cell in cells.items():
        print(f"\n{name}")
        writers.get(name, _show_networks)(cell)
        for what in cell.get("missing", ()):
            print(f"  not here: {what}")


def _show_kernels(cell: Mapping[str, Any]) -> None:
    print(f"  {EXACT}, from call to return")
    for row in cell["rows"]:
        bar = "" if row["bar"] is None else f"  bar {row['bar']:g}: {'reached' if row['reached'] else 'NOT REACHED'}"
        each = row[f"instructions_per_{row['unit']}"]
        print(f"  {row['kernel']:28} {row['core']:9} {row['instructions']:12,}  {each:7.3f} a {row['unit']}{bar}")


def _show_tvm(cell: Mapping[str, Any]) -> None:
    if cell["rows"]:
        print(f"  {EXACT}, from call to return; Apache TVM {cell['rows'][0]['tvm']}, a linear map 32x192x192")
    for row in cell["rows"]:
        form = "int32 sums, no requantization" if row["form"] == "sums" else "bias, requantization, INT8"
        print(f"  {row['schedule']:14} {form:30} {row['instructions']:12,}  {row['instructions_per_mac']:7.3f} a mac")


def _show_plans(cell: Mapping[str, Any]) -> None:
    print(f"  RAM, arena and flash by the linker; {EXACT}; {MODELLED}")
    for row in cell["rows"]:
        fits = "" if row["fits"] else f"  does not fit {cell['device']}: built for {row['device']}"
        print(
            f"  {row['plan']:38} arena {row['arena_bytes']:9,}  RAM {row['ram_bytes']:9,}  flash {row['flash_bytes']:9,}  "
            f"{row['instructions'] / 1e6:7.1f} M instructions  {row['modelled_ms']:6.0f} ms modelled{fits}"
        )
    for row in cell["rows"]:
        print(f"  {row['plan']}, instructions by operator, all layers together:")
        for operator in row["operators"]:
            each = "" if operator["instructions_per_mac"] is None else f"  {operator['instructions_per_mac']:.3f} a mac"
            print(f"    {operator['operator']:28} {operator['kernel']:18} {operator['instructions']:12,}{each}")


def _show_networks(cell: Mapping[str, Any]) -> None:
    if cell["rows"]:
        print(f"  {cell['device']}; RAM and flash by the linker; {EXACT}, mean of the images compared; {MODELLED}")
    for row in cell["rows"]:
        print(
            f"  {row['network']:9} {row['accuracy_engine']:6.2f} % as INT8, {row['accuracy_fp32']:6.2f} % in FP32 of {row['test_images']:,}"
            f" test images  RAM {row['ram_bytes']:8,}  flash {row['flash_bytes']:9,}  {row['instructions'] / 1e6:6.2f} M instructions  "
            f"{row['modelled_ms']:6.1f} ms modelled"
        )
        print(f"            {row['sizes']}")
        print(f"            bytes equal in QEMU, on this computer and in NumPy: {row['images_equal_in_qemu_host_interpreter']:,} images")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--cache", type=Path, default=Path(".cache/mcu"))
    parser.add_argument("--runs", type=Path, help="folder of searched and trained networks")
    parser.add_argument("--images", type=int, default=1000, help="test images whose bytes are compared, of each network")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--tvm", default="", metavar="PYTHON", help="a Python with apache-tvm; otherwise one is installed into the cache")
    parser.add_argument("--resume", action="store_true", help="the default: go on with what is cached")
    parser.add_argument("--fresh", action="store_true", help="forget what is cached first, an installed TVM excepted")
    given = parser.parse_args(arguments)
    if reason := mcu_c.PLUGIN.unavailable():
        raise SystemExit(f"error: {reason}")
    bench = Bench(given.cache, given.runs and given.runs.resolve(), given.images, given.jobs, given.tvm)
    if given.fresh:
        for path in given.cache.glob("*.json"):
            path.unlink()
    cells = {name: bench.cell(name) for name in given.cells}
    if given.json:
        environment = {name: toolchain.version(name) for name in mcu_c.TOOLS}
        figures = {name: value for cell in cells.values() for name, value in cell.get("figures", {}).items()}
        print(json.dumps({"figures": figures, "labels": LABELS, "environment": environment, "cells": cells}, indent=1))
        return
    show(cells)


if __name__ == "__main__":
    main()

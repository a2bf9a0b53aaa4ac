"""A latency table built on an idle machine and again beside a process that keeps another core busy: how far are the two apart?

    python tools/benchmarks/table_noise.py --json

Both tables are made from nothing, as `nascompile profile` does it; the busy process multiplies matrices from the first row to the last
network. `rows` are ratios busy / idle of the operators' times, `networks` those of predictions for random candidates, uncalibrated and as
a table gives them. The table that is built again on the idle machine says what a ratio is worth. One thread, batch 1, random weights.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from table_accuracy import MODELS, Case, table_of

from nascompile import latency_table, plugins, space as spaces, targets
from nascompile.records import LatencyTable

BAR = 0.05
"""What the median ratio of rows, and that of whole networks, may differ from 1."""
CANDIDATES = 200
BUSY = "import numpy as np\na = np.random.default_rng(0).random((700, 700), dtype=np.float32)\nwhile True:\n    a @ a"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=["vit_demo", "minilm"])
    parser.add_argument("--busy", type=int, default=1, help="busy processes; one core is left where there are that many more")
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--cache", type=Path, default=Path(".cache/table_noise"))
    given = parser.parse_args()
    found = [compare(model, given.backend, given.busy, given.cache) for model in given.models]
    device = plugins.get("devices", targets.LOCAL).describe()
    content = {"rows": found, "bar": BAR, "busy": given.busy, "device": device, "met": all(r["met"] for r in found)}
    print(json.dumps(content, indent=1)) if given.json else [print(row) for row in found]


def compare(model: str, backend: str, busy: int, cache: Path) -> dict[str, Any]:
    """Idle, busy, idle again; ratios to the first."""
    tables = []
    for name, processes in (("idle", 0), ("busy", busy), ("again", 0)):
        case = Case(model, backend, 1, cache / name)
        with _busy(processes):
            tables.append(table_of(case, fresh=True))
        print(f"{model}, {name}: {tables[-1].seconds:.0f} s", file=sys.stderr, flush=True)
    rng = np.random.default_rng(3)
    points = [spaces.sample(case.space, rng) for _ in range(CANDIDATES)]
    idle, other, again = tables
    found = {"model": model, "busy": _ratios(case, idle, other, points), "idle again": _ratios(case, idle, again, points)}
    worst = max(abs(found["busy"][key]["median"] - 1) for key in ("rows", "networks"))
    found |= {"seconds": [t.seconds for t in tables], "interval": [latency_table.error_text(t) for t in tables]}
    return {**found, "met": worst <= BAR}


def _ratios(case: Case, a: LatencyTable, b: LatencyTable, points: list[Any]) -> dict[str, Any]:
    rows = [d.ratio for d in latency_table.diff(a, b) if d.ratio]
    networks = [case.predicted(b, p).value / case.predicted(a, p).value for p in points]
    plain = [ratio * a.scale / b.scale for ratio in networks]
    return {key: _spread(values) for key, values in (("rows", rows), ("networks", networks), ("networks, uncalibrated", plain))}


def _spread(values: list[float]) -> dict[str, float]:
    low, middle, high = np.quantile(values, [0.05, 0.5, 0.95])
    return {"median": float(middle), "p5": float(low), "p95": float(high)}


@contextmanager
def _busy(count: int) -> Iterator[None]:
    """`count` processes that do nothing but multiply."""
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen([sys.executable, "-c", BUSY], env=environment) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()

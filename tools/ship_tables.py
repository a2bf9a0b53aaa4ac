"""Latency tables of this machine's processor that come with the package: two networks, each backend, one and two threads.

    python tools/ship_tables.py            # those that are not there, or were taken with another runtime or lowering
    python tools/ship_tables.py --check    # which of them no longer fit the code; nothing is timed

Written to nascompile/latency_tables. A table is used on another machine only if its processor, runtime, and our lowering are the same.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers import BertConfig

import nascompile
from nascompile import latency_table, models, network, plugins, profiler, records, targets
from nascompile.records import LatencyTable, Target

PACKAGE = Path(nascompile.__file__).parent
TABLES = PACKAGE / "latency_tables"
MINILM_TOKENS = 48
THREADS = (1, 2)


def networks() -> tuple[tuple[Any, Any, int], ...]:
    """(family, configuration, tokens): the demo's ViT, and six-layer MiniLM at the length of the movie reviews."""
    minilm = BertConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12)
    described = ((models.read_config(PACKAGE / "demo" / "model"), 0), (minilm, MINILM_TOKENS))
    return tuple((models.family_of(config.model_type), config, tokens) for config, tokens in described)


def main() -> int:
    """Exit status 1 if `--check` finds a table that does not fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    if given.check:
        now = latency_table.lowering_digest()
        stale = [path for path in sorted(TABLES.rglob("*.json")) if _lowering(records.load(path, LatencyTable)) != now]
        print("\n".join(f"taken with another lowering: {path.relative_to(PACKAGE.parent)}" for path in stale) or "all fit")
        return bool(stale)
    for (family, config, tokens), backend_name, threads in itertools.product(networks(), targets.runnable(targets.LOCAL), THREADS):
        target = targets.make(targets.LOCAL, backend_name, family.workload(config, 1, tokens), threads)
        path = _time(family, config, target)
        table = records.load(path, LatencyTable)
        name = path.relative_to(PACKAGE.parent)
        print(f"{name}: {len(table.rows)} rows, ± {table.relative_error:.1%}, {table.seconds:.0f} s", flush=True)
    return 0


def _time(family: Any, config: Any, target: Target) -> Path:
    """The table of a target, timed unless it is there."""
    backend, device = plugins.get("backends", target.backend), plugins.get("devices", targets.LOCAL)
    environment = device.environment(target, backend.versions())
    space = network.search_space(family, config, backend, target, "")
    for path in TABLES.rglob("*.json"):
        table = records.load(path, LatencyTable)
        if table.target != target:
            continue
        differ = {name for name, _, _ in latency_table.differences(table.environment, environment)}
        if not differ:
            return path
        if "cpu" not in differ:
            path.unlink()  # of another lowering or runtime
    with tempfile.TemporaryDirectory() as folder:
        table = profiler.profile(family, config, space, target, backend, device, Path(folder), 0)
    path = latency_table.path_for(TABLES, table)
    records.save(table, path)
    return path


def _lowering(table: LatencyTable) -> Any:
    return dict(table.environment.must_match)["lowering"]


if __name__ == "__main__":
    sys.exit(main())

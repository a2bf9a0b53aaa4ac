"""A device over ssh as a profile sees it: what it is now, a table of it by a kit that is run there, and a few rows timed again."""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nascompile import kit, kit_import, latency_table, profiler, remote, targets
from nascompile.errors import UnsupportedError
from nascompile.families import Family
from nascompile.progress import Progress, Silent
from nascompile.records import Environment, LatencyTable, Precision, SearchSpace, Target, digest, write_atomic


class RemoteDevice:
    """Asked what it is when this is made; UnsupportedError if it cannot be reached or lacks the runtime."""

    def __init__(self, target: Target, progress: Progress | None = None) -> None:
        profile = targets.load_profile(target.device)
        self.target, self.progress = target, progress or Silent()
        self.connection = remote.Connection(profile.transport, profile.python, self.progress)
        there = self.connection.probe(target.backend)
        self.form = kit.form_of(target.backend, there.machine, frozenset(there.isa))
        own = kit_import.must_match(there.device, there.versions, target, latency_table.lowering_digest())
        self.environment = Environment(must_match=own)

    def profile(
        self, family: Family, config: Any, space: SearchSpace, folder: Path, seed: int, seconds: float, fresh: bool = False
    ) -> LatencyTable:  # fmt: skip
        """A new table. Interrupted, the next call goes on with the same kit in `folder`, and there with what it has timed.

        `fresh`: nothing counts that was timed there before the first of these calls.
        """
        self._check(space.precisions)
        described = (config.to_json_string(use_diff=False), space, self.target, self.form.passes, seconds, seed, self.environment)
        place = folder / f"kit-{digest(*described, kit.method())[:16]}"
        if not place.exists():
            kit.export(family, config, space, self.target, self.form, "cpu", seed, place, self.progress, seconds=seconds)
        results = place.with_suffix(".json")
        write_atomic(results, self.connection.run(place, _token(place.with_suffix(".token")) if fresh else ""))
        again = "make a new table: `nascompile profile --fresh` with the same settings"
        table = kit_import.table_of(results, place, Silent(), again)
        shutil.rmtree(place)
        results.unlink()
        return table

    def canary(self, table: LatencyTable, family: Family, config: Any, space: SearchSpace, folder: Path, seed: int) -> float:
        """Median of now / table over a few rows of the space; TableError if the device is not as fast as it was, or is another."""
        latency_table.check_environment(table, self.environment)
        bench = profiler.Bench(family, config, space, self.target, self.form, folder, seed)
        picked = profiler.to_repeat(bench, table)
        stacks = [(operator, bench.copies(operator)) for operator in picked]
        self.progress.note(f"{self.connection.address}: timing {len(stacks)} operators again, to see whether it is as fast as it was")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            kit.export_stacks(bench, stacks, Path(scratch) / "kit", profiler.CANARY_SECONDS)
            found = kit_import.times_of(self.connection.run(Path(scratch) / "kit", secrets.token_hex(8)), Path(scratch) / "kit")
        return profiler.compare(bench, table, picked, [found[kit.graph_id(*stack)] for stack in stacks])

    def _check(self, precisions: Sequence[Precision]) -> None:
        """UnsupportedError for a precision that cannot be run there."""
        for precision in precisions:
            if reason := self.form.supports(precision):
                raise UnsupportedError(
                    f"`{self.target.device}` cannot run {precision.name} with {self.target.backend}: {reason}",
                    hint="leave it out of `search.precisions`, or take --backend onnxruntime",
                )


def _token(path: Path) -> str:
    """Kept in a file until the work that it stands for is done."""
    if not path.exists():
        write_atomic(path, secrets.token_hex(8).encode())
    return path.read_text(encoding="utf-8")

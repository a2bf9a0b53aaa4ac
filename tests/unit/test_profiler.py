"""The profiler against a backend and a device whose every time is known."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from nascompile import journal, latency_table, network, profiler
from nascompile.devices import Job
from nascompile.errors import TableError, UnsupportedError
from nascompile.families import Group, Segment
from nascompile.progress import Silent
from nascompile.records import INT8, Environment, Operator, Quantity, TableRow, Target, Workload

CALL_MS, HEAD_MS = 0.4, 0.05
TARGET = Target(device="cpu", backend="stub", workload=Workload())


def block_ms(operator: Operator) -> float:
    if operator.kind != "mlp":
        return HEAD_MS
    return operator.dim("width") / 100 / (2 if operator.precision.name == "int8" else 1)


class Family:
    """Three layers of one linear, and a head."""

    name = "stub"
    reads_first_token = False

    def segments(self, config):
        layers = (Segment(f"layers.{i}.mlp", "mlp", "", i, ("x", "input"), (f"w{i}",), (f"w{i}",), "int8") for i in range(3))
        return (*layers, Segment("head", "head", "", None, ("h", "input"), ("h",)))

    def parameters(self, config):
        return {"w0": (64, 8), "w1": (64, 8), "w2": (64, 8), "h": (8,)}

    def groups(self, config):
        return tuple(Group(f"layers.{i}.width", 1, 64, ((f"w{i}", 0),), i) for i in range(3))

    def choices(self, config, width_multiple):
        return {"depth": (1, 2, 3)} | {f"layers.{i}.width": (16, 32, 64) for i in range(3)}

    def operator(self, config, segment, values, workload, precision, first=False):
        if segment.kind == "head":
            return Operator(kind="head", dims=(("hidden", 8),), precision=precision)
        return Operator(kind="mlp", dims=(("width", values[f"layers.{segment.layer}.width"]),), precision=precision)

    def macs(self, operator):
        return operator.dim("width") if operator.kind == "mlp" else 1

    def activations(self, operator):
        return 8

    def inputs(self, config):
        return ()


class Backend:
    name, accepts, width_multiple, passes = "stub", "onnx", 8, ()

    def supports(self, precision):
        return ""

    def versions(self):
        return (("stub", "1"),)

    def build(self, form, target, folder):
        return ("g",)

    def load(self, folder, graphs, target):
        raise AssertionError("the stub lowering hands over runners")


class Device:
    """Adds the call to whatever it is given; `pace` slows it, `times` counts what was timed."""

    name = "cpu"

    def __init__(self, pace=lambda window: 1.0, noise=lambda name, window: 0.0, machine="A"):
        self.pace, self.noise, self.machine = pace, noise, machine
        self.windows, self.timed, self.fail_after = 0, [], math.inf

    def environment(self, target, versions):
        return Environment(must_match=(("cpu", self.machine), *versions))

    def reference(self):
        return Job("reference", 1.0, {})

    def time(self, jobs, *, seconds, seed, min_samples=30):
        if self.windows >= self.fail_after:
            raise KeyboardInterrupt
        self.windows += 1
        self.timed.append([job.name for job in jobs])
        found = []
        for job in jobs:
            value = (job.runner + (0 if job.name == "reference" else CALL_MS)) * self.pace(self.windows)
            middle = value * (1 + self.noise(job.name, self.windows))
            found.append(Quantity(value=value, unit="ms", kind="measured", n=9, quantiles=((0.1, value), (0.5, middle))))
        return tuple(found)


@pytest.fixture(autouse=True)
def lowering(monkeypatch):
    """Forms are milliseconds; a network may cost more than the sum of its operators."""
    extra = SimpleNamespace(factor=lambda candidate: 1.0)

    def lower(blueprint, family, config, space, candidate, target, weights, ranges, backend, keep=None):
        assert {name for name, _, _ in ranges.sites} == {"w0", "w1", "w2"}
        assert weights["w0"].dtype == np.float32
        graph = network.graph(family, config, space, candidate, target)
        # the call is added by the device, so a factor on the whole has to include it
        return (CALL_MS + sum(block_ms(node.operator) for node in graph.nodes)) * extra.factor(candidate) - CALL_MS

    monkeypatch.setattr(profiler.lowering, "export", lambda family, config, folder: folder)
    monkeypatch.setattr(profiler.lowering, "blueprint", lambda *arguments: None)
    monkeypatch.setattr(profiler.lowering, "lower", lower)
    monkeypatch.setattr(profiler.lowering, "lower_operator", lambda b, f, c, operator, repeat, *rest: repeat * block_ms(operator))
    monkeypatch.setattr(profiler, "_idle", lambda: 0.0)
    monkeypatch.setattr(profiler.Bench, "_job", lambda self, name, model, scratch: Job(name, model, {}))
    return extra


@pytest.fixture
def space():
    return network.search_space(Family(), None, Backend(), TARGET, "digest")


def profile(space, folder: Path, device, **options):
    return profiler.profile(Family(), None, space, TARGET, Backend(), device, folder, 0, **options)


def values(table):
    return {row.operator: row.latency.value for row in table.rows}


def test_rows_are_the_blocks_own_time_and_the_call_is_counted_once(space, tmp_path):
    table = profile(space, tmp_path, Device())
    wanted = network.operators(Family(), None, space, TARGET)
    assert len(wanted) == 7
    assert set(values(table)) == set(wanted)
    assert table.call.value == pytest.approx(CALL_MS)
    for operator, value in values(table).items():
        assert value == pytest.approx(block_ms(operator), rel=1e-9)
    assert (table.scale, table.relative_error, table.drift) == (1.0, latency_table.FLOOR, 0.0)
    assert not latency_table.missing(table, wanted)
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_networks_fit_the_scale_and_others_give_the_interval(space, tmp_path, lowering):
    lowering.factor = lambda candidate: 1.3 + 0.04 * (int(candidate.id, 16) % 2)
    table = profile(space, tmp_path, Device())
    fitting, checking = ({r.candidate for r in side} for side in (table.calibration, table.validation))
    assert len(fitting) == profiler.NETWORKS
    assert fitting == checking
    assert 1.25 < table.scale < 1.4
    errors = [r.measured.value / r.predicted_ms - 1 for r in table.validation]
    assert max(map(abs, errors)) < 0.04, "predictions of validation networks include the scale"
    assert max(map(abs, errors)) <= table.relative_error < 0.1
    assert table.rows == profile(space, tmp_path, Device()).rows, "the scale is not worked into the rows"


def test_disturbed_networks_neither_fit_nor_widen_unless_there_are_no_others(space, tmp_path, lowering):
    def disturbed(name):
        return " " not in name and len(name) == 12 and int(name, 16) % 3 == 0  # a third of the candidates, by their id

    lowering.factor = lambda candidate: 1.5 if disturbed(candidate.id) else 1.1
    table = profile(space, tmp_path, Device(noise=lambda name, window: 0.4 if disturbed(name) else 0.0), networks=20)
    assert any(disturbed(r.candidate.id) for r in table.calibration)
    assert not any(disturbed(r.candidate.id) for r in table.validation)
    assert table.scale == pytest.approx(1.1)
    assert table.relative_error == latency_table.FLOOR
    busy = profile(space, tmp_path, Device(noise=lambda name, window: 0.4), networks=20)
    assert busy.scale == pytest.approx(1.1), "a median, most networks being alike"
    assert busy.relative_error > 0.1


def test_picked_networks_are_spread_over_latency(space, tmp_path):
    table = profile(space, tmp_path, Device(), networks=6)
    found = sorted(r.measured.value for r in (*table.calibration, *table.validation))
    fastest, slowest = CALL_MS + 0.05 + 0.08, CALL_MS + 0.05 + 3 * 0.64
    gaps = np.diff([fastest, *found, slowest])
    assert len({r.candidate for r in (*table.calibration, *table.validation)}) == 6
    assert gaps.max() < 0.5 * (slowest - fastest), "six of three kinds of precision"


def test_a_killed_profile_times_only_what_is_left(space, tmp_path, monkeypatch):
    monkeypatch.setattr(profiler, "BATCH_ROWS", 3)
    killed = Device()
    killed.fail_after = 2  # the call, and the first of two batches
    with pytest.raises(KeyboardInterrupt):
        profile(space, tmp_path, killed)
    (part,) = tmp_path.glob("*.part")
    kept = [row.operator.label for row in journal.read(part, TableRow)]
    assert len(kept) == 6  # the call, two anchors, three of the other five
    assert kept[0].startswith("call")
    part.write_bytes(part.read_bytes() + b'{"data": {"operator": {"di')  # killed in the middle of a line

    device = Device()
    table = profile(space, tmp_path, device)
    again = [name for window in device.timed for name in window]
    assert not set(again) & set(kept[3:])
    assert set(kept[1:3]) <= set(again), "the anchors are timed in every window"
    assert device.windows == 3, "one batch, stacks of different depths, and the networks"
    assert table.rows == profile(space, tmp_path / "other", Device()).rows
    assert not list(tmp_path.glob("*.part"))


def test_part_of_another_environment_is_not_used(space, tmp_path):
    killed = Device(machine="B")
    killed.fail_after = 2
    with pytest.raises(KeyboardInterrupt):
        profile(space, tmp_path, killed)
    device = Device()
    profile(space, tmp_path, device)
    assert sum(map(len, device.timed)) > 7


def test_existing_rows_are_kept_and_only_missing_ones_timed(space, tmp_path):
    full = profile(space, tmp_path, Device())
    rows = tuple(r for r in full.rows if r.operator.kind != "head")
    device = Device(pace=lambda window: 1.5)
    table = profile(space, tmp_path, device, existing=msgspec.structs.replace(full, rows=rows, scale=2.0))
    assert device.timed[0][0] == "reference"
    assert [n[:4] for n in device.timed[0][1:]] == ["mlp ", "mlp ", "head"]
    assert values(table) == pytest.approx(values(full)), "new rows are brought to the pace of the old ones"
    assert (table.scale, table.call) == (1.0, full.call), "and the networks that give a new scale"
    with pytest.raises(TableError, match="other cpu"):
        profile(space, tmp_path, Device(machine="B"), existing=full)


def test_a_killed_extension_times_only_what_is_left(space, tmp_path, monkeypatch):
    monkeypatch.setattr(profiler, "BATCH_ROWS", 2)
    full = profile(space, tmp_path, Device())
    few = msgspec.structs.replace(full, rows=full.rows[4:])
    killed = Device()
    killed.fail_after = 1  # of two batches of two
    with pytest.raises(KeyboardInterrupt):
        profile(space, tmp_path, killed, existing=few)
    device, told = Device(), Told()
    table = profile(space, tmp_path, device, existing=few, progress=told)
    rows, depths, networks = (len(window) for window in device.timed)
    assert (rows, networks) == (1 + 2 + 2, 1 + 2 + profiler.NETWORKS)
    assert 1 < depths < 10, "of the groups that have new rows"
    assert told.notes[0].startswith("2 of 7 operators to time, then 36 whole networks: ")
    assert values(table) == pytest.approx(values(full))


class Told(Silent):
    """What a person was told."""

    def __init__(self):
        self.steps, self.notes = [], []

    def step(self, label, done, total):
        self.steps.append((label, done, total))

    def note(self, text):
        self.notes.append(text)


def test_every_step_of_a_profile_is_told_with_its_number(space, tmp_path, monkeypatch):
    monkeypatch.setattr(profiler, "BATCH_ROWS", 3)
    told = Told()
    profile(space, tmp_path, Device(), networks=4, progress=told)
    assert [step[1:] for step in told.steps if step[0] == "building operators"] == [(n, 7) for n in (0, 2, 3, 4, 5, 5, 6)]
    assert [step[1:] for step in told.steps if step[0] == "timing operators"] == [(n, 7) for n in (0, 5, 5, 7)]
    assert [step[1:] for step in told.steps if step[0] == "building whole networks"] == [(n, 4) for n in range(4)]
    assert [step[1:] for step in told.steps if step[0] == "timing whole networks"] == [(0, 4), (4, 4)]
    whole = profiler.ROW_SECONDS * 7 + profiler.NETWORK_SECONDS * 4
    assert told.notes == [
        f"7 of 7 operators to time, then 4 whole networks: {whole:.0f} s of timing, and building",
        f"timing 4 whole networks side by side for about {4 * profiler.NETWORK_SECONDS:.0f} s",
    ]
    told = Told()
    profile(space, tmp_path, Device(), networks=4, progress=told, seconds=100.0)
    assert "100 s of timing" in told.notes[0]


def test_windows_are_brought_to_the_pace_of_the_first(space, tmp_path, monkeypatch):
    monkeypatch.setattr(profiler, "BATCH_ROWS", 3)
    table = profile(space, tmp_path, Device(pace=lambda window: 1.2 if window == 3 else 1.0))
    for operator, value in values(table).items():
        assert value == pytest.approx(block_ms(operator), rel=1e-9)
    assert table.drift == pytest.approx(0.2)


def test_noisy_rows_are_timed_again_and_flagged_if_they_stay_so(space, tmp_path):
    def noise(name, window):
        if "width=64" in name:
            return 0.5
        return 0.5 if "width=32" in name and window == 2 else 0.0

    table = profile(space, tmp_path, Device(noise=noise))
    assert {row.operator.dim("width") for row in table.rows if row.noisy} == {64}


def test_canary(space, tmp_path):
    table = profile(space, tmp_path, Device())
    arguments = (table, Family(), None, space, Backend())
    assert profiler.canary(*arguments, Device(pace=lambda window: 1.05), tmp_path, 0) == pytest.approx(1.05)
    for pace in (1.2, 0.8):
        with pytest.raises(TableError, match="not as fast as") as caught:
            profiler.canary(*arguments, Device(pace=lambda window, pace=pace: pace), tmp_path, 0)
        assert f"{pace:.2f} times" in caught.value.message
        assert "nascompile profile" in caught.value.hint
    noisy = msgspec.structs.replace(table, rows=tuple(msgspec.structs.replace(row, noisy=True) for row in table.rows))
    with pytest.raises(TableError, match="not as fast as"):
        profiler.canary(noisy, *arguments[1:], Device(pace=lambda window: 1.2), tmp_path, 0)
    with pytest.raises(TableError, match="no operator of this space"):
        profiler.canary(msgspec.structs.replace(table, rows=()), *arguments[1:], Device(), tmp_path, 0)
    with pytest.raises(TableError, match="other cpu"):
        profiler.canary(*arguments, Device(machine="B"), tmp_path, 0)


def test_a_form_that_cannot_be_timed_is_refused(space, tmp_path):
    backend = Backend()
    backend.accepts = "torch"
    with pytest.raises(UnsupportedError, match="takes torch"):
        profiler.profile(Family(), None, space, TARGET, backend, Device(), tmp_path, 0)


def test_batches_hold_what_fits(space, tmp_path, monkeypatch):
    bench = profiler.Bench(Family(), None, space, TARGET, Backend(), tmp_path, 0)
    operators = network.operators(Family(), None, space, TARGET)
    whole = 4 * profiler.LEAST_REPEAT * 64 * 8
    monkeypatch.setattr(profiler, "BATCH_BYTES", whole)
    batches = list(profiler._batches(bench, operators))
    assert sorted(o.label for b in batches for o in b) == sorted(o.label for o in operators)
    assert all(sum(map(bench.bytes_of, b)) <= whole for b in batches)
    assert len(batches) > 2
    assert INT8 in {o.precision for o in operators}


def test_rows_say_what_they_cost_in_networks_of_other_sizes(space, tmp_path, monkeypatch):
    """A cache of 4000 bytes: every byte of a stack that does not fit into it costs more."""
    sizes = network.operator_bytes(Family(), None, space, TARGET)

    def stack(blueprint, family, config, operator, repeat, *rest):
        late = 1e-4 * sizes[operator] * (repeat * sizes[operator] > 4000) if operator.kind == "mlp" else 0.0
        return repeat * (block_ms(operator) + late)

    monkeypatch.setattr(profiler.lowering, "lower_operator", stack)
    table = profile(space, tmp_path, Device())
    for row in table.rows:
        if row.operator.kind == "mlp" and row.operator.precision.name == "fp32":
            late = 1e-4 * sizes[row.operator] * (row.footprint > 4000)
            assert latency_table.at(row.reach, 10**6) - latency_table.at(row.reach, 1) == pytest.approx(1e-4 * sizes[row.operator])
            assert row.latency.value + latency_table.at(row.reach, 1) == pytest.approx(block_ms(row.operator))
            assert late > 0, "its stack weighs what the largest network does"
        if row.operator.kind == "head":
            assert (row.footprint, row.reach) == (0, ())


def test_networks_of_every_precision_are_picked(space, tmp_path):
    table = profile(space, tmp_path, Device(), networks=12)
    kinds = [{name for _, name in dict(r.candidate.precision)[TARGET.id]} for r in table.calibration]
    assert min(kinds.count({"fp32"}), kinds.count({"int8"})) >= 4, "a third each"
    assert kinds.count({"fp32", "int8"}) >= 1, "of the last third, where one layer cannot be mixed"

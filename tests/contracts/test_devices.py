"""What every device plug-in promises, and the timing that real ones share."""

from __future__ import annotations

import gc
import math
import sys
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest

from nascompile import latency_table, plugins, records
from nascompile.devices import Job, cpu, interleave
from nascompile.errors import UnsupportedError
from nascompile.records import EngineManifest, Target, Workload

COUNTING = ("qemu_m7", "serial_m7")
"""Devices for which a runner without a board is modelled from a count."""


class Runner:
    """Busy for a while; says the same to a simulated device and to one that counts."""

    board = SimpleNamespace(clock_mhz=100.0)

    def count(self, inputs):
        return SimpleNamespace(counts=np.array([[2**31, 2**31]], np.uint32) // 100)

    def run(self, inputs):
        sum(range(2000))
        return {}

    def simulated_ms(self, batch):
        return 0.5 * batch


@pytest.fixture(params=plugins.names("devices"))
def device(request):
    found = plugins.get("devices", request.param)
    if request.param == "cuda":
        request.getfixturevalue("gpu")()  # a stand-in for the driver
    if reason := found.unavailable():
        pytest.skip(reason)
    assert found.name == request.param
    return found


def test_it_describes_itself(device):
    assert isinstance(device.describe(), str)
    assert "\n" not in device.describe()


def test_its_environment_names_all_that_decides_speed(device):
    target = Target(device=device.name, backend="b", workload=Workload(), threads=3, session=(("arena", "on"),))
    environment = device.environment(target, (("runtime", "1.2"),))
    must = dict(environment.must_match)
    assert must["threads"] == 3
    assert must["session.arena"] == "on"
    assert must["runtime"] == "1.2"
    assert must["lowering"] == latency_table.lowering_digest()
    assert device.environment(target, (("runtime", "1.2"),)).must_match == environment.must_match, "the same twice"
    for other in (target.__class__(device=device.name, backend="b", workload=Workload(), threads=2, session=target.session),):
        differ = latency_table.differences(environment, device.environment(other, (("runtime", "1.3"),)))
        assert {name for name, _, _ in differ} == {"threads", "runtime"}
    assert records.msgspec.json.decode(records.encode(environment), type=records.Environment) == environment


def test_it_times_in_milliseconds_with_quantiles(device):
    jobs = [Job("a", Runner(), {"x": np.zeros((1, 2))}), device.reference()]
    found = device.time(jobs, seconds=0.05, seed=0, min_samples=20)
    assert len(found) == 2
    for latency in found:
        assert latency.unit == "ms"
        if device.name in COUNTING:  # one run says all
            assert (latency.kind, latency.n) == ("modelled", 1)
        else:
            assert (latency.kind in ("measured", "simulated"), latency.n >= 20) == (True, True)
        assert 0 < latency.value < 1000
        levels = [latency.quantile(q) for q in (0.1, 0.5, 0.9, 0.99)]
        assert levels == sorted(levels)
        assert latency.value <= latency.quantile(0.5)


def test_throughput_counts_samples(device):
    got = device.throughput(Job("a", Runner(), {"x": np.zeros((8, 2))}), 8, seconds=0.05)
    assert got.unit == "samples/s"
    assert got.n >= 1
    assert got.value > 0


# ---------------------------------------------------------------------------------------------- interleaving, on a clock of our own


class Machine:
    """A clock that only moves when something runs, and a speed that may depend on the time."""

    def __init__(self, slowdown=lambda now: 1.0):
        self.now, self.log, self.slowdown = 0.0, [], slowdown

    def clock(self):
        return self.now

    def call(self, name, seconds, cold=0.0):
        def run():
            assert not gc.isenabled()
            extra = cold if not self.log or self.log[-1] != name else 0.0
            self.log.append(name)
            self.now += (seconds + extra) * self.slowdown(self.now)

        return run


def test_every_round_visits_all_in_another_order():
    machine = Machine()
    calls = [machine.call(name, 11e-3) for name in "abc"]
    interleave.interleave(calls, seconds=0.8, seed=1, min_samples=1, clock=machine.clock)
    warm = math.ceil(interleave.WARM / 11e-3)  # calls that a visit does not record
    visits = machine.log[3 * (1 + warm) :]  # as many to plan, after a first one
    order = [visits[i] for i in range(0, len(visits), warm + round(interleave.VISIT / 11e-3))]
    rounds = [tuple(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(set(rounds)) > 3
    again = Machine()
    interleave.interleave([again.call(n, 11e-3) for n in "abc"], seconds=0.8, seed=1, min_samples=1, clock=again.clock)
    assert again.log == machine.log, "the same seed, the same order"


def test_cold_calls_of_a_visit_are_not_recorded():
    machine = Machine()
    calls = [machine.call("a", 3e-3, cold=1e-3), machine.call("b", 5e-3, cold=2e-3)]
    found = interleave.interleave(calls, seconds=1.0, seed=0, min_samples=1, clock=machine.clock)
    np.testing.assert_allclose(found[0], 3e-3, rtol=1e-6)
    np.testing.assert_allclose(found[1], 5e-3, rtol=1e-6)


def test_short_calls_are_batched_and_long_ones_recorded_singly():
    machine = Machine()
    calls = [machine.call("short", 1e-6), machine.call("long", 1e-3)]
    found = interleave.interleave(calls, seconds=0.5, seed=0, min_samples=1, clock=machine.clock)
    samples = round(interleave.VISIT / 1e-3)
    rounds = len(found[1]) // samples
    assert rounds >= interleave.ROUNDS
    assert len(found[0]) == pytest.approx(interleave.VISIT / interleave.SAMPLE * rounds, rel=0.05)
    assert machine.log.count("short") > 95 * len(found[0]), "of a hundred calls each"
    np.testing.assert_allclose(found[0], 1e-6, rtol=1e-6)


def test_the_statistic_survives_a_neighbour_and_drift_hits_all_alike():
    def neighbour(now):  # doubles everything eight tenths of the time, and so two calls in three
        return 2.0 if (now * 7.3) % 1 < 0.8 else 1.0

    def drifting(now):
        return 1.0 + 0.03 * now

    for slowdown, survives in ((neighbour, True), (drifting, False)):
        machine = Machine(slowdown)
        calls = [machine.call("a", 1e-3), machine.call("b", 2e-3)]
        found = interleave.interleave(calls, seconds=10, seed=0, min_samples=1, clock=machine.clock)
        a, b = (interleave.quantity(samples, "measured") for samples in found)
        assert b.value / a.value == pytest.approx(2.0, rel=0.01)
        assert (a.value == pytest.approx(1.0, rel=0.01)) is survives
        assert a.quantile(0.5) > 1.1, "the median does not"


def test_enough_samples_are_taken_but_never_for_ever():
    machine = Machine()
    found = interleave.interleave([machine.call("a", 1e-3)], seconds=0.011, seed=0, min_samples=25, clock=machine.clock)
    assert 25 <= len(found[0]) < 100, "the cap of four times the asked time also holds"
    slow = Machine()
    found = interleave.interleave([slow.call("a", 1.0)], seconds=2.0, seed=0, min_samples=1000, clock=slow.clock)
    assert len(found[0]) < 10
    assert slow.now < 3 + interleave.CAP * 2 + 2
    assert interleave.interleave([], seconds=1, seed=0, min_samples=5) == []


def test_garbage_collection_comes_back_after_an_error():
    def broken():
        raise RuntimeError("engine")

    with pytest.raises(RuntimeError):
        interleave.interleave([broken], seconds=1, seed=0, min_samples=1)
    assert gc.isenabled()


# ---------------------------------------------------------------------------------------------- processors


def test_instruction_sets_have_one_spelling(monkeypatch):
    monkeypatch.setattr(cpu, "_cpuinfo", lambda: {"flags": "fpu avx512vnni AVX2 amx_int8"})
    assert cpu._isa() == ("amx_int8", "avx2", "avx512_vnni")
    monkeypatch.setattr(cpu, "_cpuinfo", lambda: {"features": "fp asimd asimddp sve"})
    assert cpu._isa() == ("dotprod", "neon", "sve")


def test_lowering_digest_follows_the_code(tmp_path, monkeypatch):
    (tmp_path / "passes").mkdir()
    (tmp_path / "passes" / "fold.py").write_text("a = 1")
    monkeypatch.setattr(latency_table, "__file__", str(tmp_path / "latency_table.py"))
    seen = {latency_table.lowering_digest()}
    (tmp_path / "lowering.py").write_text("b = 1")
    seen.add(latency_table.lowering_digest())
    (tmp_path / "passes" / "fold.py").write_text("a = 2")
    seen.add(latency_table.lowering_digest())
    assert len(seen) == 3


BACKEND = """
    import numpy as np
    class Runner:
        def run(self, inputs):
            return {"y": np.ones(int(inputs["megabytes"]) * 2**20 // 8)}
    class Backend:
        def load(self, folder, graphs, target):
            assert graphs == ("g.onnx",)
            return Runner()
    PLUGIN = Backend()
"""


def test_peak_memory_is_that_of_a_fresh_process(tmp_path, monkeypatch):
    package = tmp_path / "site" / "stub_engine"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(textwrap.dedent(BACKEND))
    metadata = tmp_path / "site" / "stub_engine-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: stub-engine\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[nascompile.backends]\nstub = stub_engine:PLUGIN\n")
    monkeypatch.setenv("PYTHONPATH", ":".join([str(tmp_path / "site"), *sys.path]))
    target = Target(device="cpu", backend="stub", workload=Workload())
    manifest = EngineManifest(
        name="e", role="baseline", target=target, files=(), graphs=("g.onnx",), inputs=(), outputs=(), labels=(), task="classification"
    )
    records.save(manifest, tmp_path / "engine" / "manifest.json")
    ballast = np.ones(300 * 2**20 // 8)  # this process is large; the fresh one must not inherit that
    small, large = (cpu.PLUGIN.peak_memory("stub", str(tmp_path / "engine"), target, {"megabytes": np.array(m)}) for m in (1, 101))
    assert ballast.nbytes
    assert small < 200 * 2**20
    assert large - small == pytest.approx(100 * 2**20, rel=0.1)
    with pytest.raises(UnsupportedError, match="exit status 1"):
        cpu.PLUGIN.peak_memory("stub", str(tmp_path / "nowhere"), target, {"megabytes": np.array(1)})

"""Variants of an engine: the fastest right one is kept, and everything else with the reason why it was not."""

from __future__ import annotations

import errno
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest

from nascompile import plugins, variants
from nascompile.errors import UnsupportedError
from nascompile.records import FLOAT32, INT8, Target, Workload

INPUTS = {"x": np.ones((1, 2), np.float32)}
CHECK = variants.Check(INPUTS, np.zeros((1, 3)), 0.01)


class Runner:
    def __init__(self, ms: float, off: float = 0.0) -> None:
        self.ms, self.off = ms, off

    def run(self, inputs: Any) -> dict[str, Any]:
        return {"logits": np.full((1, 3), self.off)}

    def simulated_ms(self, batch: int) -> float:
        return self.ms


class Backend:
    """Takes `ms` a call, times what its settings say."""

    tunable: tuple[Any, ...] = ()
    rounding: tuple[Any, ...] = ()

    def __init__(self, name: str, ms: float = 1.0, off: float = 0.0, **factors: dict[str, float]) -> None:
        self.name, self.ms, self.off, self.factors = name, ms, off, factors
        self.tunable = tuple((setting, tuple(values)) for setting, values in factors.items())

    def supports(self, precision: Any) -> str:
        return "floats only" if self.name == "floats" and precision != FLOAT32 else ""

    def build(self, form: Any, target: Target, folder: Any) -> tuple[str, ...]:
        if self.name == "broken":
            raise RuntimeError("no such\n  operator")
        if self.name == "full":
            raise OSError(errno.ENOSPC, "no space")
        return ("g",)

    def load(self, folder: Any, graphs: Any, target: Target) -> Runner:
        ms, off = self.ms, self.off
        for name, value in target.session:
            if value == "breaks":
                raise UnsupportedError("unknown value of it: breaks")
            off += value == "wrong"
            ms *= self.factors[name][value]
        return Runner(ms, off)


def contender(backend: Backend, **session: str) -> variants.Contender:
    target = Target(device="fake", backend=backend.name, workload=Workload(), session=tuple(sorted(session.items())))
    return variants.Contender(target, backend, lambda: "form")  # type: ignore[arg-type]


@pytest.fixture
def device() -> Any:
    """Simulates, with one percent of noise."""
    return plugins.get("devices", "fake")


def choose(backends: list[Backend], device: Any, tmp_path: Any) -> Any:
    return variants.choose([contender(b) for b in backends], (FLOAT32, INT8), CHECK, INPUTS, device, tmp_path, 0)


def test_the_fastest_backend_that_is_right_is_kept(device: Any, tmp_path: Any) -> None:
    backends = [
        Backend("slow", 2.0), Backend("quick", 1.0), Backend("wrong", 0.1, off=0.02), Backend("nan", 0.1, off=float("nan")),
        Backend("broken"), Backend("floats", 0.1), Backend("near", 1.5, off=0.009),
    ]  # fmt: skip
    kept, tried = choose(backends, device, tmp_path)
    assert kept.contender.backend.name == "quick"
    assert [v.backend for v in tried] == [b.name for b in backends]
    found = {v.backend: v for v in tried}
    assert [name for name, v in found.items() if v.kept] == ["quick"]
    assert (found["quick"].reason, found["quick"].latency.n > 0) == ("", True)
    assert found["slow"].reason == "2.00 times the latency of quick" or found["slow"].reason.startswith(("1.9", "2.0"))
    assert found["slow"].latency.quantile(0.5) == pytest.approx(2.0, rel=0.02)
    assert "off by 0.02 on the sample, accepted is 0.01" in found["wrong"].reason
    assert "off by nan" in found["nan"].reason
    assert found["broken"].reason == "fails: RuntimeError: no such operator"
    assert found["floats"].reason == "cannot run int8: floats only"
    assert [name for name, v in found.items() if v.latency is None] == ["wrong", "nan", "broken", "floats"]


def test_a_tie_goes_to_the_searchs_own_backend(tmp_path: Any, device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from nascompile.devices import fake

    monkeypatch.setattr(fake, "NOISE", 0.0)
    assert choose([Backend("b"), Backend("a")], device, tmp_path)[0].contender.backend.name == "b"


def test_where_nothing_runs_every_reason_is_given(device: Any, tmp_path: Any) -> None:
    with pytest.raises(UnsupportedError, match="no backend that runs here can build the engine") as caught:
        choose([Backend("broken"), Backend("floats")], device, tmp_path)
    assert caught.value.detail.splitlines() == ["broken: fails: RuntimeError: no such operator", "floats: cannot run int8: floats only"]


def test_a_full_disk_is_no_fault_of_a_backend(device: Any, tmp_path: Any) -> None:
    with pytest.raises(OSError, match="no space"):
        choose([Backend("quick"), Backend("full")], device, tmp_path)


# ---------------------------------------------------------------------------------------------- session settings


def tune(backend: Backend, device: Any, tmp_path: Any, **session: str) -> Any:
    one = contender(backend, **session)
    built = variants.Built(one, tmp_path, ("g",), backend.load(tmp_path, (), one.target))
    return variants.tune(built, CHECK, INPUTS, device, 0)


def test_settings_that_gain_more_than_noise_are_adopted_together(device: Any, tmp_path: Any) -> None:
    backend = Backend("b", arena={"1": 1.0, "0": 0.9}, level={"all": 1.0, "basic": 1.3, "some": 0.8}, spin={"1": 1.0, "0": 0.985})
    target, trials = tune(backend, device, tmp_path, level="all")
    assert dict(target.session) == {"level": "some", "arena": "0"}
    found = {v.setting: v for v in trials}
    assert set(found) == {"arena=0", "level=basic", "level=some", "spin=0"}
    assert [s for s, v in found.items() if v.kept] == ["arena=0", "level=some"]
    assert dict(found["arena=0"].session) == {"level": "some", "arena": "0"}, "tried on top of what had been adopted"
    assert found["arena=0"].ratio.low < 0.9 < found["arena=0"].ratio.high < variants.MARGIN
    assert found["spin=0"].ratio.high > variants.MARGIN, "a second look, and not enough"
    assert found["spin=0"].reason == "not faster by more than 2 % and noise"
    assert (found["level=basic"].ratio, found["level=basic"].reason[:4]) == (None, "1.30")


def test_of_two_values_of_a_setting_the_better_is_adopted(device: Any, tmp_path: Any) -> None:
    target, trials = tune(Backend("b", level={"all": 1.0, "less": 0.9, "none": 0.7}), device, tmp_path)
    assert dict(target.session) == {"level": "none"}
    assert next(v.reason for v in trials if v.setting == "level=less") == "another value of level was adopted before"


def test_a_setting_that_fails_or_changes_the_logits_is_not_adopted(device: Any, tmp_path: Any) -> None:
    backend = Backend("b", mode={"plain": 1.0, "breaks": 0.1, "wrong": 0.1})
    target, trials = tune(backend, device, tmp_path)
    assert target.session == ()
    reasons = {v.setting: v.reason for v in trials}
    assert reasons["mode=breaks"] == "fails: unknown value of it: breaks"
    assert "off by 1 on the sample" in reasons["mode=wrong"]
    assert all(v.latency is None for v in trials)


def test_settings_that_round_another_way_are_tried_where_that_is_accepted(device: Any, tmp_path: Any) -> None:
    backend = Backend("b", mode={"plain": 1.0, "fast": 0.9}, floats={"f32": 1.0, "wrong": 0.5})
    backend.tunable, backend.rounding = backend.tunable[:1], backend.tunable[1:]
    target, trials = tune(backend, device, tmp_path)
    assert (target.session, [v.setting for v in trials]) == ((("mode", "fast"),), ["mode=fast"])
    one = contender(backend)
    built = variants.Built(one, tmp_path, ("g",), backend.load(tmp_path, (), one.target))
    target, trials = variants.tune(built, CHECK, INPUTS, device, 0, replace(CHECK, tolerance=1.5))
    assert target.session == (("floats", "wrong"), ("mode", "fast"))  # the second is checked as loosely as the first was
    assert all(v.kept for v in trials)
    target, trials = variants.tune(built, CHECK, INPUTS, device, 0, replace(CHECK, tolerance=0.5))
    assert target.session == (("mode", "fast"),)


def test_noise_is_adopted_by_nobody(device: Any, tmp_path: Any) -> None:
    values = {str(i): 1.0 for i in range(12)}
    for seed in range(5):
        one = contender(backend := Backend("b", x=values))
        built = variants.Built(one, tmp_path, ("g",), backend.load(tmp_path, (), one.target))
        target, trials = variants.tune(built, CHECK, INPUTS, device, seed)
        assert (target, len(trials)) == (one.target, 11)


def test_a_backend_without_settings_is_left_alone(device: Any, tmp_path: Any) -> None:
    target, trials = tune(Backend("b"), device, tmp_path)
    assert (target.session, trials) == ((), ())


def test_settings_reach_onnxruntime(tmp_path: Any) -> None:
    pytest.importorskip("onnxruntime")
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["x"], ["y"])], "g", [x], [y])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), tmp_path / "m.onnx")
    backend = plugins.get("backends", "onnxruntime")

    def options(**session: str) -> Any:
        target = Target(device="cpu", backend="onnxruntime", workload=Workload(), session=tuple(sorted(session.items())))
        return backend.load(tmp_path, ("m.onnx",), target).session.get_session_options()

    plain = options()
    assert (plain.enable_cpu_mem_arena, plain.enable_mem_pattern) == (True, True)
    assert not options(enable_cpu_mem_arena="0").enable_cpu_mem_arena
    assert not options(enable_mem_pattern="0").enable_mem_pattern
    with pytest.raises(UnsupportedError, match="unknown enable_mem_pattern: no"):
        options(enable_mem_pattern="no")
    with pytest.raises(UnsupportedError, match="unknown session setting of onnxruntime: arena") as caught:
        options(arena="0")
    assert "enable_cpu_mem_arena" in caught.value.hint


@pytest.mark.parametrize("name", plugins.names("backends"))
def test_what_backends_declare_are_alternatives(name: str) -> None:
    for _, values in plugins.get("backends", name).tunable:
        assert len(set(values)) == len(values) > 1


def test_a_line_says_what_was_kept(device: Any, tmp_path: Any) -> None:
    backend = Backend("quick", arena={"1": 1.0, "0": 0.9}, level={"all": 1.0, "basic": 1.3})
    kept, tried = choose([Backend("slow", 2.0), backend, Backend("broken")], device, tmp_path)
    _, settings = variants.tune(kept, CHECK, INPUTS, device, 0)
    text = variants.describe((*tried, *settings))
    assert text.startswith(("quick 1", "quick 0.9"))
    assert "; not slow: 2" in text or "; not slow: 1.9" in text
    assert "; not broken: fails: RuntimeError: no such operator; arena=0 × 0.9" in text
    assert text.endswith(" adopted of 2 session settings tried")

"""What every backend promises, whichever it is."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from nascompile import lowering, network, plugins, space as spaces
from nascompile.errors import DataError, NascompileError
from nascompile.families.toy import ToyConfig
from nascompile.records import FLOAT32, INT8, Precision, Target, TensorFormat


@pytest.fixture(params=plugins.names("backends"))
def backend(request):
    found = plugins.get("backends", request.param)
    if "cuda" in getattr(found, "devices", ()):
        request.getfixturevalue("gpu")()  # a stand-in: what needs a GPU is done with it, on every machine
    if reason := found.unavailable():
        pytest.skip(reason)
    return found


@pytest.fixture
def built(backend, tmp_path):
    """(runner, graphs, target, feed) of the toy network, built and loaded."""
    if backend.accepts != "onnx":
        pytest.skip(f"takes {backend.accepts}")
    family, config = plugins.get("families", "toy"), ToyConfig(layers=2)
    model = family.create(config)
    target = Target(device="cpu", backend=backend.name, workload=family.workload(config, 1, 0), session=backend.session())
    space = network.search_space(family, config, backend, target, "model")
    blueprint = lowering.blueprint(family, config, lowering.export(family, config, tmp_path), backend)
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    form = lowering.lower(blueprint, family, config, space, spaces.largest(space), target, weights, None, backend)
    folder = tmp_path / "graphs"
    folder.mkdir()
    graphs = backend.build(form, target, folder)
    return backend.load(folder, graphs, target), graphs, target, {"features": np.ones((3, 16), np.float32)}, folder


def test_describes_itself(backend):
    assert plugins.get("backends", backend.name) is backend
    assert backend.accepts in ("onnx", "torch", "hf_folder", "program")
    assert backend.width_multiple > 0
    assert set(backend.passes) <= set(plugins.names("passes"))
    assert list(backend.session()) == sorted(backend.session())
    assert all(isinstance(name, str) and isinstance(value, str) for name, value in (*backend.session(), *backend.versions()))
    assert backend.versions()


def test_every_declared_setting_and_value_is_one_that_loads(built, backend):
    runner, graphs, target, feed, folder = built
    want = runner.run(feed)["logits"]
    for name, values in backend.tunable:
        for value in values:
            session = tuple(sorted((dict(target.session) | {name: value}).items()))
            other = backend.load(folder, graphs, msgspec.structs.replace(target, session=session))
            np.testing.assert_allclose(other.run(feed)["logits"], want, atol=1e-5)  # float32 sums of another order
        silent = msgspec.structs.replace(target, session=tuple(pair for pair in target.session if pair[0] != name))
        assert backend.load(folder, graphs, silent).run(feed)


def test_supports_what_it_is_for_and_gives_a_reason_for_what_it_does_not(backend):
    assert backend.supports(INT8 if backend.accepts == "program" else FLOAT32) == ""
    odd = Precision(name="int3", weights=TensorFormat(kind="int", bits=3, granularity="group", group_size=7))
    assert backend.supports(odd)


def test_names_the_files_it_wrote(built):
    _, graphs, _, _, folder = built
    assert graphs
    assert sorted(p.name for p in folder.iterdir() if p.suffix != ".json") == sorted(graphs)  # what describes them is no graph


def test_runs_any_batch_and_gives_named_outputs(built):
    runner, _, _, feed, _ = built
    for batch in (1, 3):
        found = runner.run({"features": feed["features"][:batch]})
        assert set(found) == {"logits"}
        assert found["logits"].shape == (batch, 2)
        assert found["logits"].dtype == np.float32


def test_two_calls_give_the_same_bytes(built):
    runner, _, _, feed, _ = built
    assert runner.run(feed)["logits"].tobytes() == runner.run(feed)["logits"].tobytes()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: {}, "features"),
        (lambda f: f | {"extra": f["features"]}, "extra"),
        (lambda f: {"features": f["features"].astype(np.float64)}, "float64"),
        (lambda f: {"features": f["features"].tolist()}, "features"),
    ],
    ids=["missing", "unknown", "dtype", "list"],
)
def test_wrong_inputs_are_named(built, change, said):
    runner, _, _, feed, _ = built
    with pytest.raises(DataError, match=said):
        runner.run(change(feed))


def test_a_damaged_graph_is_an_expected_failure(built, backend):
    _, graphs, target, _, folder = built
    (folder / graphs[0]).write_bytes(b"\x00garbage")
    with pytest.raises(NascompileError, match=graphs[0]):
        backend.load(folder, graphs, target)


def test_unknown_session_settings_are_refused(built, backend):
    _, graphs, target, _, folder = built
    odd = Target(device="cpu", backend=backend.name, workload=target.workload, session=(("no_such_setting", "1"),))
    with pytest.raises(NascompileError, match="no_such_setting"):
        backend.load(folder, graphs, odd)


def test_the_fake_backend_simulates_cost_that_grows_with_work_and_falls_with_integers(tmp_path):
    backend, family = plugins.get("backends", "fake"), plugins.get("families", "toy")
    config = ToyConfig(layers=2)
    target = Target(device="fake", backend="fake", workload=family.workload(config, 1, 0))
    space = network.search_space(family, config, backend, target, "model")
    blueprint = lowering.blueprint(family, config, lowering.export(family, config, tmp_path), backend)

    def cost(operator, repeat, batch=1):
        form = lowering.lower_operator(blueprint, family, config, operator, repeat, backend, seed=0)
        return backend.load(tmp_path, backend.build(form, target, tmp_path), target).simulated_ms(batch)

    blocks = [o for o in network.operators(family, config, space, target) if o.kind == "mlp" and o.precision == FLOAT32]
    small, large = min(blocks, key=family.macs), max(blocks, key=family.macs)
    assert cost(small, 1) < cost(large, 1)
    assert cost(large, 4) - cost(large, 2) == pytest.approx(2 * (cost(large, 2) - cost(large, 1)))
    assert cost(large, 1, batch=8) - cost(large, 1, batch=1) == pytest.approx(7 * family.macs(large) / 1e6)
    integer = next(o for o in network.operators(family, config, space, target) if o.dims == large.dims and o.precision != FLOAT32)
    assert cost(integer, 1, batch=100) < cost(large, 1, batch=100)

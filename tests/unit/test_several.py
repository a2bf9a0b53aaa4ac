"""Which devices a recipe names, which of them are here, what bounds each, and where tables of the others are found."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from nascompile import latency_table, places, records, settings, several, targets
from nascompile.errors import RecipeError, TableError, UnsupportedError
from nascompile.records import Environment, LatencyTable, Operator, Quantity, TableRow, Target, Workload
from nascompile.settings import Budgets, Recipe, SearchSettings

MLP, HEAD = Operator(kind="mlp", dims=(("width", 8),)), Operator(kind="head", dims=())


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A folder with profiles: two of simulated devices, one of a kind that nothing here can time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(places.platformdirs, "user_data_path", lambda name: tmp_path / "user")
    monkeypatch.setattr(places, "_packaged", lambda kind: ())
    Path("profiles").mkdir()
    for name, kind in (("one", "fake"), ("two", "fake"), ("pi4", "kit-of-old")):
        Path(f"profiles/{name}.toml").write_text(f'kind = "{kind}"\nbackends = ["fake"]\n')


def recipe(also, first="one", latency_ms=None, **fields) -> Recipe:
    return Recipe(device=first, also=tuple(also), budgets=Budgets(max_drop=1.0, latency_ms=latency_ms), **fields)


def first_of(r: Recipe) -> Target:
    return targets.make(r.device, r.backend, Workload(), r.threads)


def check(r: Recipe) -> None:
    several.check(r, first_of(r))


def write_table(target: Target, rows=(MLP,), cpu="Cortex-A72", name="fake-a", **must) -> Path:
    ms = Quantity(value=1.0, unit="ms", kind="measured")
    fields = {"cpu": cpu, "threads": target.threads, "lowering": latency_table.lowering_digest()} | must
    table = LatencyTable(
        target=target, environment=Environment(must_match=tuple(fields.items())),
        rows=tuple(TableRow(operator=o, latency=ms) for o in rows), relative_error=0.1,
    )  # fmt: skip
    path = Path("latency_tables") / target.device / f"{name}.json"
    records.save(table, path)
    return path


# ---------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("pi4", ("pi4", "", 0)),
        ("cpu:openvino", ("cpu", "openvino", 0)),
        ("cpu::2", ("cpu", "", 2)),
        ("cpu:openvino:16", ("cpu", "openvino", 16)),
    ],
)
def test_a_device_is_written_with_backend_and_threads(text, parts):
    assert targets.Named.parse(text) == targets.Named(*parts)


@pytest.mark.parametrize("text", ["", ":openvino", "cpu:openvino:0", "cpu:openvino:two", "cpu:a:1:b", "c pu", "cpu::-1", "cpu::²"])
def test_what_is_no_device_is_refused_with_the_recipe(text):
    with pytest.raises(RecipeError, match="not a device"):
        targets.Named.parse(text)
    with pytest.raises(RecipeError) as caught:
        settings.check(recipe([text]))
    assert repr(text) in caught.value.detail


def test_the_targets_of_a_run_share_the_workload():
    first = targets.make("one", "", Workload(sequence=40))
    found = targets.several(first, ("two", "one::2", "two:fake:3"))
    assert [targets.label(t) for t in found] == ["one:fake:1", "two:fake:1", "one:fake:2", "two:fake:3"]
    assert {t.workload for t in found} == {Workload(sequence=40)}


@pytest.mark.parametrize("also", [("one",), ("one:fake",), ("two", "two::1"), ("one::1",)])
def test_the_same_device_twice_is_refused(also):
    with pytest.raises(RecipeError, match=r"same device twice: (one|two):fake:1") as caught:
        check(recipe(also))
    assert "NAME:BACKEND:THREADS" in caught.value.hint


def test_an_unknown_device_or_backend_is_refused():
    with pytest.raises(UnsupportedError, match="unknown device: three") as caught:
        check(recipe(["three"]))
    assert "devices --init three" in caught.value.hint
    with pytest.raises(UnsupportedError, match="no backend named openvino"):
        check(recipe(["two:openvino"]))
    with pytest.raises(RecipeError, match="compared for one device"):
        check(recipe(["two:auto"]))


def test_a_backend_found_by_measuring_is_for_one_device():
    with pytest.raises(RecipeError) as caught:
        settings.check(recipe(["two"], backend="auto"))
    assert "backend = auto" in caught.value.detail


# ---------------------------------------------------------------------------------------------- budgets


def bounds(latency_ms, also=("two", "one::2")):
    r = recipe(also, latency_ms=latency_ms)
    found = targets.several(first_of(r), r.also)
    return {targets.label(t): several.latencies(r, found)[t.id] for t in found if t.id in several.latencies(r, found)}


def test_each_bound_goes_to_the_device_it_names():
    assert bounds(3.0) == {"one:fake:1": 3.0}
    assert bounds({"": 3.0, "two": 20.0}) == {"one:fake:1": 3.0, "two:fake:1": 20.0}
    assert bounds({"one::2": 5.0, "one:fake:1": 4.0}) == {"one:fake:1": 4.0, "one:fake:2": 5.0}
    assert bounds(None) == {}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"three": 1.0}, "not searched for: three"),
        ({"one": 1.0}, "one may be any of 2"),
        ({"": 1.0, "one::1": 2.0}, "two latency budgets"),
        ({"two": 1.0, "two:fake": 2.0}, "two latency budgets for two:fake:1"),
    ],
)
def test_a_bound_for_no_single_device_is_refused(given, says):
    with pytest.raises(RecipeError, match=says):
        check(recipe(["two", "one::2"], latency_ms=given))


def test_a_bound_of_nothing_or_no_number_is_refused_with_the_recipe():
    for given, says in (({"two": 0.0}, "budgets.latency_ms.two = 0.0"), ({"a:b:c:d": 1.0}, "'a:b:c:d' is no device")):
        with pytest.raises(RecipeError) as caught:
            settings.check(recipe(["two"], latency_ms=given))
        assert says in caught.value.detail
    with pytest.raises(RecipeError, match="cannot be run"):
        settings.check(Recipe(budgets=Budgets(latency_ms={})))


def test_the_worst_ratio_needs_a_bound_for_every_device():
    ratio = SearchSettings(objectives=("error", "worst_ratio"))
    check(recipe(["two"], latency_ms={"": 1.0, "two": 2.0}, search=ratio))
    with pytest.raises(RecipeError, match="every device: none for two:fake:1") as caught:
        check(recipe(["two"], latency_ms=1.0, search=ratio))
    assert caught.value.hint == "--latency-ms two:fake:1=MS"
    with pytest.raises(RecipeError) as caught:
        settings.check(recipe(["two"], search=ratio))
    assert "worst_ratio" in caught.value.detail


def test_a_latency_by_device_comes_from_toml(tmp_path):
    (tmp_path / "r.toml").write_text('device = "one"\nalso = ["two"]\n[budgets]\nlatency_ms = {one = 3, "two:fake" = 20.5}\n')
    found = settings.from_toml(tmp_path / "r.toml")
    assert found.budgets.latency_ms == {"one": 3.0, "two:fake": 20.5}
    ids = {b.target: b.bound for b in found.budgets.bounds("a", ["b"], {"a": 3.0, "b": 20.5})}
    assert ids == {"a": 3.0, "b": 20.5}
    (tmp_path / "r.toml").write_text('[budgets]\nlatency_ms = {one = "fast"}\n')
    with pytest.raises(RecipeError) as caught:
        settings.from_toml(tmp_path / "r.toml")
    assert "latency_ms" in caught.value.detail


# ---------------------------------------------------------------------------------------------- devices that are not here


def test_a_device_that_is_not_here_and_has_no_table_is_refused_with_what_makes_one():
    with pytest.raises(TableError, match=r"`pi4:fake:1` cannot run here and has no latency table: it is of kind kit-of-old") as caught:
        check(recipe(["pi4"]))
    assert "nascompile kit export" in caught.value.hint
    write_table(targets.make("pi4", "", Workload(sequence=9)))
    check(recipe(["pi4"]))  # of another workload, which is known once the data are read
    with pytest.raises(TableError, match="has no latency table"):
        check(recipe(["pi4::2"]))


def further(also) -> several.Further:
    r = recipe([also])
    return several.further(r, first_of(r))[0]


def test_the_table_of_a_device_that_is_not_here_is_the_one_that_lacks_fewest():
    write_table(targets.make("pi4", "", Workload()), rows=(HEAD,), name="fake-a")
    whole = write_table(targets.make("pi4", "", Workload()), rows=(HEAD, MLP), name="fake-b")
    write_table(targets.make("pi4", "", Workload(batch=8)), rows=(HEAD, MLP), name="fake-c")
    found = further("pi4")
    assert found.absent
    assert found.table((HEAD, MLP), None).path.resolve() == whole.resolve()
    with pytest.raises(TableError, match="lacks 1 of the network's operators") as caught:
        found.table((HEAD, MLP, Operator(kind="x", dims=())), None)
    assert "kit export" in caught.value.hint


@pytest.mark.parametrize(
    ("target", "must", "says"), [({"workload": Workload(batch=8)}, {}, "workload"), ({}, {"lowering": "old"}, "other sources")]
)
def test_a_table_that_does_not_fit_says_why(target, must, says):
    made = msgspec.structs.replace(targets.make("pi4", "", Workload()), **target)
    write_table(made, **must)
    with pytest.raises(TableError, match="fits this model") as caught:
        further("pi4").table((MLP,), None)
    assert says in caught.value.detail


def test_a_profile_whose_tables_are_of_another_processor_is_not_this_machine():
    assert further("two").absent == ""
    write_table(targets.make("two", "", Workload()))
    assert "taken on Cortex-A72, this is fake" in further("two").absent
    write_table(targets.make("two", "", Workload()), cpu="fake", name="fake-b")
    assert further("two").absent == ""


def test_a_first_device_whose_tables_are_of_another_machine_is_not_timed_here():
    path = write_table(first_of(recipe([])))
    with pytest.raises(UnsupportedError, match="`one` is not this machine: its tables were taken on Cortex-A72, this is fake") as caught:
        check(recipe([]))
    assert "--tables FILE --allow-foreign" in caught.value.hint
    check(recipe([], tables=str(path), allow_foreign=True))
    path.unlink()
    write_table(first_of(recipe([])), cpu="fake")
    check(recipe([]))

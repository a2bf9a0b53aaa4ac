"""The benchmark of joint precision on the toy network: what each search may choose, its arithmetic, its resumption, masked genes."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from nascompile import pareto, space as spaces
from nascompile.searchers.encoding import Encoding
from nascompile.searchers.gaussian import Features

torch.set_num_threads(1)

BUDGET, SEEDS = 16, 2
BENCHMARKS = Path(__file__).parents[2] / "tools" / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import joint_precision

        yield joint_precision


@pytest.fixture(scope="module")
def arguments(tmp_path_factory, into):
    with pytest.MonkeyPatch.context() as patch:
        folder = into(tmp_path_factory.mktemp("joint"), patch)
        numbers = ["--seeds", str(SEEDS), "--budget", str(BUDGET), "--engines", "1"]
        yield ["--json", "--tasks", "toy", *numbers, "--runs", str(folder / "none"), "--cache", str(folder / "cache")]


@pytest.fixture(scope="module")
def printed(bench, arguments):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        bench.main(arguments)
    return json.loads(out.getvalue())["rows"][0]


@pytest.fixture(scope="module")
def world(bench, arguments, printed):
    cache = Path(arguments[arguments.index("--cache") + 1])
    return bench.World(bench.Place.of("toy", cache / "none", cache), "cpu", leads=True)


@pytest.fixture(scope="module")
def found(bench, world):
    """Method ▸ searches by seed, as they are kept."""
    kept = [bench.msgspec.json.decode(path.read_bytes(), type=bench.Search) for path in (world.place.folder / "searches").glob("*.json")]
    assert len(kept) == SEEDS * len(bench.METHODS)
    return {method: sorted((s for s in kept if s.method == method), key=lambda s: s.seed) for method in bench.METHODS}


def test_each_search_spends_no_more_than_its_budget_and_scores_nothing_twice(bench, found):
    for method, searches in found.items():
        for one in searches:
            assert len(set(one.genomes)) == len(one.genomes) <= BUDGET
            if method != bench.FIRST:  # which shares its budget out over a few architectures
                assert len(one.genomes) == BUDGET
    assert found[bench.JOINT][0].genomes != found[bench.JOINT][1].genomes


def test_a_control_changes_only_what_it_may(bench, world, found):
    top = dict(spaces.largest(world.space).architecture)

    def points(method):
        return [world.candidate(genome) for one in found[method] for genome in one.genomes]

    def precisions(point):
        return {value for _, value in point.precision[0][1]}

    assert {frozenset(precisions(p)) for p in points(bench.FP32)} == {frozenset({"fp32"})}
    assert {frozenset(precisions(p)) for p in points(bench.INT8)} == {frozenset({"int8"})}
    assert all(dict(p.architecture) == top for p in points(bench.PRECISION))
    assert len({tuple(sorted(precisions(p))) for p in points(bench.PRECISION)}) > 1
    assert len({p.architecture for p in points(bench.JOINT)}) > 5
    assert any(precisions(p) == {"fp32", "int8"} for p in points(bench.JOINT))
    for one in found[bench.FIRST]:
        first, then = one.genomes[: BUDGET // 2], one.genomes[BUDGET // 2 :]
        assert all(precisions(world.candidate(g)) == {"fp32"} for g in first)
        assert {world.candidate(g).architecture for g in then} <= {world.candidate(g).architecture for g in first}
        assert then
        assert any("int8" in precisions(world.candidate(g)) for g in then)


def test_hypervolumes_are_areas(bench, printed, found):
    """Against the share of a fine grid's points that some candidate dominates."""
    error, ms = printed["reference"]["error"], printed["reference"]["latency_ms"]
    grid = (np.arange(1000) + 0.5) / 1000
    for method, searches in found.items():
        shares = []
        for one in searches:
            least = np.full(1000, np.inf)
            for e, latency in zip(one.errors, one.latencies, strict=True):
                least[grid * ms >= latency] = np.minimum(least[grid * ms >= latency], e)
            shares.append(float(np.clip(1 - least / error, 0, 1).mean()))
        assert printed["methods"][method]["hypervolume"][0] == pytest.approx(np.mean(shares), abs=2e-3)
    assert printed["methods"][bench.JOINT]["hypervolume"][0] > 0


def test_engines_are_the_fastest_that_are_as_accurate(bench, world, printed, found):
    bar = world.error(spaces.uniform(world.space), {})
    base = printed["engines"]["whole_networks"]["INT8"]
    assert base["speed_up"] == base["size_reduction"] == 1
    assert set(printed["engines"]["bars"]) == set(bench.BARS)
    for name, methods in printed["engines"]["bars"].items():
        loss, no_larger = bench.BARS[name]
        assert set(methods) == set(bench.METHODS)
        for method, entry in methods.items():
            one = found[method][0]
            rows = [(ms, e, world.candidate(g)) for ms, e, g in zip(one.latencies, one.errors, one.genomes, strict=True)]
            least = world.pricing.costs(spaces.uniform(world.space))["size_mb"]
            fit = [ms for ms, e, p in rows if e <= bar + loss + 1e-9 and not (no_larger and world.pricing.costs(p)["size_mb"] > least)]
            assert entry["found"] == bool(fit)
            for engine in entry["engines"]:
                assert engine["predicted_ms"] <= 1.02 * min(fit)
                assert engine["accuracy"]["validation"] >= 100 - bar - loss - 1
                assert engine["speed_up"] == pytest.approx(base["latency_ms"][0] / engine["latency_ms"][0], rel=0.1)
                assert engine["size_reduction"] == pytest.approx(base["size_mb"] / engine["size_mb"])
    assert any(entry["engines"] for entry in printed["engines"]["bars"]["within half a point"].values())
    assert printed["engines"]["whole_networks"]["FP32"]["size_reduction"] < 0.6


def test_what_is_kept_is_not_searched_or_built_again(bench, printed, arguments, monkeypatch, capsys):
    from nascompile import build

    def again(*given, **named):
        raise AssertionError("done again")

    monkeypatch.setattr(bench, "search", again)
    monkeypatch.setattr(build, "build", again)
    monkeypatch.setattr(bench.Place, "_profile", again)
    bench.main([*arguments, "--resume"])
    assert json.loads(capsys.readouterr().out)["rows"][0] == printed
    with pytest.raises(AssertionError, match="done again"):
        bench.main([*arguments, "--budget", str(BUDGET + 1)])


def test_inactive_genes_are_masked(world):
    """Whatever is drawn for the genes of a dropped layer, it is one candidate at one price, and the searchers' models see the same."""
    space, encoding, rng = world.space, Encoding(world.space), np.random.default_rng(0)
    features = Features(encoding)
    dropped = 0
    for _ in range(50):
        rows = np.repeat(rng.integers(0, encoding.sizes)[None], 8, axis=0)
        off = ~encoding.active(rows)[0]
        rows[:, off] = rng.integers(0, encoding.sizes[off], size=(8, int(off.sum())))
        if not off.any():
            continue
        dropped += len(np.unique(rows, axis=0)) > 1
        kinds = {encoding.genes[i].kind for i in np.flatnonzero(off)}
        assert kinds == {"architecture", "precision"}
        points = {spaces.decode(space, tuple(int(i) for i in row)) for row in rows}
        (point,) = points
        layers = {f"layers.{layer}" for layer in spaces.kept_layers(space, point)}
        named = [name for name, _ in (*point.architecture, *point.precision[0][1]) if name.startswith("layers.")]
        assert {name.rpartition(".")[0].replace(".attention", "").replace(".mlp", "") for name in named} <= layers
        assert len({world.latency(p) for p in points}) == 1
        for seen in (encoding.one_hot(rows), *features(rows)):
            assert (seen == seen[0]).all()
    assert dropped >= 10


def test_stored_results_are_printed_or_missed_with_a_hint(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "STORED", tmp_path / "none.json.xz")
    with pytest.raises(SystemExit, match="no result is stored"):
        bench.main(["--stored"])


def test_the_committed_result_is_that_of_its_searches(bench):
    content = bench.stored()
    assert bench.STORED.stat().st_size < 300_000
    searches = bench.msgspec.convert(content["searches"], type=list[bench.Search])
    for row in content["rows"]:
        reference = (row["reference"]["error"], row["reference"]["latency_ms"])
        for method, shown in row["methods"].items():
            own = [s for s in searches if (s.task, s.method) == (row["task"], method)]
            assert sorted(s.seed for s in own) == list(range(bench.SEEDS[row["task"]]))
            volumes = [pareto.hypervolume(list(zip(s.errors, s.latencies, strict=True)), reference) for s in own]
            assert shown["hypervolume"][0] == pytest.approx(np.mean(volumes) / (reference[0] * reference[1]))
            assert {len(s.genomes) for s in own} == {row["budget"]}

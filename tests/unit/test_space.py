"""The search space against nested loops that know nothing of genes, requirements or canonical forms."""

from __future__ import annotations

import itertools

import msgspec
import numpy as np
import pytest

from nascompile import records, space as spaces
from nascompile.errors import RecipeError
from nascompile.records import FLOAT32, INT8, WEIGHT_INT8, Candidate, Gene, SearchSpace

ORDER = (1, 2, 0)
WIDTHS = (8, 16)


def make(targets: tuple[str, ...] = ("cpu",), order: tuple[int, ...] = ORDER) -> SearchSpace:
    """Three layers, one always kept, each with a width and a precision; a table precision and a resolution that nothing turns off."""
    genes = [
        Gene(name="depth", kind="architecture", choices=(1, 2, 3)),
        Gene(name="resolution", kind="architecture", choices=(24, 32)),
        Gene(name="embedding.precision", kind="precision", choices=("fp32", "weight-int8")),
    ]
    for layer in range(3):
        requires = () if order[0] == layer else (("depth", order.index(layer) + 1),)
        genes.append(Gene(name=f"layers.{layer}.width", kind="architecture", choices=WIDTHS, requires=requires))
        genes.append(Gene(name=f"layers.{layer}.mlp.precision", kind="precision", choices=("fp32", "int8"), requires=requires))
    return SearchSpace(
        family="made-up", model_digest="m", genes=tuple(genes), precisions=(FLOAT32, INT8, WEIGHT_INT8), targets=targets, layer_order=order
    )


def brute_force(targets: int, order: tuple[int, ...] = ORDER) -> set[tuple]:
    """What each different network is: (resolution, ((layer, width), …), per target (table, (layer precisions))), from plain loops."""
    found = set()
    for kept in (order[:1], order[:2], order[:3]):
        layers = sorted(kept)
        tables = list(itertools.product(("fp32", "weight-int8"), itertools.product(("fp32", "int8"), repeat=len(layers))))
        for resolution, widths in itertools.product((24, 32), itertools.product(WIDTHS, repeat=len(layers))):
            for per_target in itertools.product(tables, repeat=targets):
                found.add((resolution, tuple(zip(layers, widths, strict=True)), per_target))
    return found


def meaning(space: SearchSpace, point: Candidate) -> tuple:
    layers = spaces.kept_layers(space, point)
    per_target = tuple(
        (
            point.precision_of("embedding.precision", target),
            tuple(point.precision_of(f"layers.{i}.mlp.precision", target) for i in layers),
        )
        for target in space.targets
    )
    return point.value("resolution"), tuple((i, point.value(f"layers.{i}.width")) for i in layers), per_target


@pytest.mark.parametrize("order", [(1, 2, 0), (0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize("targets", [("cpu",), ("cpu", "gpu")])
def test_every_network_is_one_candidate_and_every_candidate_one_network(targets, order):
    space, want = make(targets, order), brute_force(len(targets), order)
    points = list(spaces.enumerate_all(space))
    assert [meaning(space, p) for p in points if meaning(space, p) not in want] == []
    assert {meaning(space, p) for p in points} == want
    assert len(points) == len(want) == spaces.size(space)
    assert len({p.id for p in points}) == len(want)


def test_inactive_genes_leave_no_trace():
    space = make()
    shallow = {slot: spaces.slot_gene(space, slot).choices[0] for slot in spaces.gene_names(space)}
    point = spaces.candidate(space, shallow)
    kept = ORDER[0]
    for dropped in ORDER[1:]:
        for change in ({f"layers.{dropped}.width": 16}, {f"layers.{dropped}.mlp.precision": "int8"}):
            assert spaces.candidate(space, shallow | change) == point
    for change in ({f"layers.{kept}.width": 16}, {f"layers.{kept}.mlp.precision": "int8"}, {"depth": 2}, {"resolution": 32}):
        assert spaces.candidate(space, shallow | change) != point
    assert [name for name, _ in point.architecture] == ["depth", "resolution", f"layers.{kept}.width"]
    with pytest.raises(KeyError):
        point.value(f"layers.{ORDER[1]}.width")
    with pytest.raises(KeyError):
        point.precision_of(f"layers.{ORDER[1]}.mlp.precision", "cpu")


@pytest.mark.parametrize("targets", [("cpu",), ("cpu", "gpu", "mcu")])
def test_encoding_is_a_bijection_on_candidates(targets):
    space = make(targets)
    choices = [spaces.slot_gene(space, slot).choices for slot in spaces.gene_names(space)]
    rng = np.random.default_rng(0)
    for _ in range(200):
        point = spaces.sample(space, rng)
        indices = spaces.encode(space, point)
        assert len(indices) == len(choices)
        assert all(0 <= index < len(options) for index, options in zip(indices, choices, strict=True))
        assert spaces.decode(space, indices) == point
        assert spaces.candidate(space, spaces.genome(space, point)) == point
        # any indices are legal, and decoding what they decode to changes nothing
        raw = tuple(int(rng.integers(len(options))) for options in choices)
        decoded = spaces.decode(space, raw)
        assert spaces.decode(space, spaces.encode(space, decoded)) == decoded
        for position, (index, options) in enumerate(zip(raw, choices, strict=True)):
            name = spaces.gene_names(space)[position]
            if name in dict(decoded.architecture):
                assert decoded.value(name) == options[index]


def test_each_target_has_precisions_of_its_own_but_one_architecture():
    space = make(("cpu", "gpu"))
    names = spaces.gene_names(space)
    assert names.count("depth") == 1
    assert {"embedding.precision", "embedding.precision@1"} <= set(names)
    genome = {slot: spaces.slot_gene(space, slot).choices[0] for slot in names} | {"embedding.precision@1": "weight-int8"}
    point = spaces.candidate(space, genome)
    assert point.precision_of("embedding.precision", "cpu") == "fp32"
    assert point.precision_of("embedding.precision", "gpu") == "weight-int8"
    assert spaces.genome(space, point)["embedding.precision@1"] == "weight-int8"


LEGAL = (("fp32", "int8", "weight-int8"), ("fp32", "weight-int8"))
"""The second target knows no INT8 products."""


def limited() -> SearchSpace:
    return msgspec.structs.replace(make(("cpu", "gpu")), legal=LEGAL)


def test_a_target_has_only_the_precisions_its_backend_knows():
    space = limited()
    want = {m for m in brute_force(2) if all(name == "fp32" for name in m[2][1][1])}
    assert 0 < len(want) < len(brute_force(2))
    points = list(spaces.enumerate_all(space))
    assert {meaning(space, p) for p in points} == want
    assert len(points) == len(want) == spaces.size(space)
    rng = np.random.default_rng(0)
    for point in (spaces.uniform(space), spaces.largest(space, "int8"), *(spaces.sample(space, rng) for _ in range(50))):
        spaces.check(space, point)
        assert spaces.decode(space, spaces.encode(space, point)) == point
    cheapest = spaces.uniform(space)
    assert cheapest.precision_of("layers.0.mlp.precision", "cpu") == "int8"
    assert cheapest.precision_of("layers.0.mlp.precision", "gpu") == "fp32"
    (first, genes), (second, others) = cheapest.precision
    illegal = tuple((name, "int8" if name.startswith("layers.0") else value) for name, value in others)
    with pytest.raises(RecipeError, match=r"layers\.0\.mlp\.precision@1 = int8 is not a choice"):
        spaces.check(space, msgspec.structs.replace(cheapest, precision=((first, genes), (second, illegal))))


def test_the_space_of_one_of_the_targets_is_the_one_it_would_have_alone():
    space = limited()
    assert spaces.of_targets(space, (0,)) == make(("cpu",))
    alone = spaces.of_targets(space, (1,))
    assert [g.name for g in alone.genes if g.kind == "precision"] == ["embedding.precision"]
    assert alone.precisions == (FLOAT32, WEIGHT_INT8)
    assert (alone.targets, alone.legal) == (("gpu",), ())
    assert spaces.of_targets(space, (0, 1)) == space
    assert spaces.of_targets(make(), (0,)) == make()


def test_what_only_several_targets_have_is_in_no_record_of_one():
    """The id of a space is a digest of what is written: journals and engines of earlier versions name it."""
    assert b"legal" not in records.encode(make())
    assert b"legal" in records.encode(limited())


def test_samples_are_seeded_and_uniform_over_each_gene():
    space = make()
    draws = [spaces.sample(space, np.random.default_rng(7)) for _ in range(2)]
    assert draws[0] == draws[1]
    rng = np.random.default_rng(1)
    depths = [spaces.sample(space, rng).value("depth") for _ in range(1500)]
    # 500 expected of each; 5 standard deviations of a binomial (√(1500·⅓·⅔) = 18)
    assert all(abs(depths.count(depth) - 500) < 5 * 18.3 for depth in (1, 2, 3))


def test_extremes():
    space = make()
    top, bottom, quantized = spaces.largest(space), spaces.smallest(space), spaces.uniform(space)
    assert meaning(space, top) == (32, ((0, 16), (1, 16), (2, 16)), (("fp32", ("fp32",) * 3),))
    assert meaning(space, bottom) == (24, ((1, 8),), (("fp32", ("fp32",)),))
    assert meaning(space, quantized) == (32, ((0, 16), (1, 16), (2, 16)), (("weight-int8", ("int8",) * 3),))
    # a precision is used where it is a choice, and only there
    assert meaning(space, spaces.largest(space, "int8"))[2] == (("fp32", ("int8",) * 3),)
    assert meaning(space, spaces.smallest(space, "weight-int8"))[2] == (("weight-int8", ("fp32",)),)


def test_kept_layers_follow_the_importance_order_and_run_in_network_order():
    space = make(order=(2, 0, 1))
    by_depth = {p.value("depth"): spaces.kept_layers(space, p) for p in spaces.enumerate_all(space)}
    assert by_depth == {1: (2,), 2: (0, 2), 3: (0, 1, 2)}


def test_a_space_without_depth_keeps_every_layer():
    space = SearchSpace(
        family="f", model_digest="m", genes=(Gene(name="layers.0.width", kind="architecture", choices=(1, 2)),), precisions=(FLOAT32,),
        targets=("cpu",), layer_order=(0, 1),
    )  # fmt: skip
    assert spaces.kept_layers(space, spaces.smallest(space)) == (0, 1)
    assert spaces.size(space) == len(list(spaces.enumerate_all(space))) == 2


def changed(point: Candidate, **changes) -> Candidate:
    return msgspec.structs.replace(point, **changes)


def refusals(space: SearchSpace) -> dict[str, tuple[Candidate, str]]:
    point = spaces.smallest(space)  # depth 1: layer 1 only
    genes = dict(point.precision)["cpu"]
    return {
        "other space": (changed(point, space="0" * 16), "another space"),
        "other target": (changed(point, precision=(("gpu", genes),)), "other targets"),
        "value that is no choice": (changed(point, architecture=(*point.architecture[:-1], ("layers.1.width", 12))), "layers.1.width = 12"),
        "depth that is no choice": (changed(point, architecture=(("depth", 9), *point.architecture[1:])), "depth = 9"),
        "no depth": (changed(point, architecture=point.architecture[1:]), "depth = None"),
        "active gene without a value": (changed(point, architecture=point.architecture[:-1]), "layers.1.width = None"),
        "inactive gene with a value": (changed(point, architecture=(*point.architecture, ("layers.2.width", 8))), "layers.2.width"),
        "inactive precision": (changed(point, precision=(("cpu", (*genes, ("layers.0.mlp.precision", "int8"))),)), "layers.0.mlp"),
        "unknown gene": (changed(point, architecture=(*point.architecture, ("layers.7.width", 8))), "layers.7.width"),
        "unknown precision gene": (changed(point, precision=(("cpu", (*genes, ("layers.7.mlp.precision", "int8"))),)), "layers.7.mlp"),
        "precision of another block": (changed(point, precision=(("cpu", (("embedding.precision", "int8"), *genes[1:])),)), "= int8"),
    }


@pytest.mark.parametrize("fault", list(refusals(make())))
def test_what_is_not_of_the_space_is_refused_by_name(fault):
    space = make()
    point, text = refusals(space)[fault]
    with pytest.raises(RecipeError, match=text):
        spaces.check(space, point)
    with pytest.raises(RecipeError, match=text):
        spaces.encode(space, point)


def test_every_candidate_of_the_space_passes():
    space = make(("cpu", "gpu"))
    for point in itertools.islice(spaces.enumerate_all(space), 0, None, 7):
        spaces.check(space, point)

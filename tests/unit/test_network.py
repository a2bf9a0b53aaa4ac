"""What network.py derives from a family, against real torch modules and PyTorch's own operation counter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, DistilBertConfig, RobertaConfig, ViTConfig

from nascompile import network, plugins, space as spaces
from nascompile.errors import RecipeError, UnsupportedError
from nascompile.families import Segment
from nascompile.families.toy import ToyConfig
from nascompile.records import FLOAT16, FLOAT32, INT8, INT8_SYMMETRIC, WEIGHT_INT8, Target, weight_only
from nascompile.supernet import extract

torch.set_num_threads(1)

TEXT = {"vocab_size": 40, "num_labels": 3, "max_position_embeddings": 20}
CASES = {
    "vit": ("vit", lambda: ViTConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=4, intermediate_size=32, image_size=8, patch_size=4, num_channels=3,
        num_labels=5,
    )),
    "bert": ("bert", lambda: BertConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=4, intermediate_size=32, **TEXT)),
    "roberta": ("bert", lambda: RobertaConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=4, intermediate_size=32, **TEXT)),
    "distilbert": ("bert", lambda: DistilBertConfig(dim=16, n_layers=3, n_heads=4, hidden_dim=32, **TEXT)),
    "toy": ("toy", lambda: ToyConfig(features=6, hidden=8, width=16, rank=4, layers=3, num_labels=5)),
}  # fmt: skip
BATCH, SEQUENCE = 2, 7


class Backend:
    """As much of a backend as a space depends on."""

    name = "made-up"

    def __init__(self, refused: tuple[str, ...] = (), width_multiple: int = 8) -> None:
        self.refused, self.width_multiple = refused, width_multiple

    def supports(self, precision) -> str:
        return "not here" if precision.name in self.refused else ""


def make(name, order=(), backend=None):
    family_name, config = CASES[name]
    family, config = plugins.get("families", family_name), config()
    backend = backend or Backend()
    target = Target(device="d", backend=backend.name, workload=family.workload(config, BATCH, SEQUENCE))
    return family, config, target, network.search_space(family, config, backend, target, "model", order)


def feed(family, config):
    found = {}
    for spec in family.inputs(config):
        shape = [{"batch": BATCH, "sequence": SEQUENCE}.get(d, d) for d in spec.shape]
        found[spec.name] = torch.ones(shape, dtype=torch.long) if spec.high else torch.randn(shape)
    return found


@pytest.fixture(params=list(CASES))
def case(request):
    return make(request.param, (2, 0, 1))


# ---------------------------------------------------------------------------------------------- the space


def test_a_layers_genes_wait_for_the_depth_that_brings_it():
    space = make("toy", (2, 0, 1))[3]  # depth from 1: half of 3 layers
    assert next(g for g in space.genes if g.name == "depth").choices == (1, 2, 3)
    wanted = {2: (), 0: (("depth", 2),), 1: (("depth", 3),)}
    for gene in space.genes:
        if gene.name.startswith("layers."):
            assert gene.requires == wanted[int(gene.name.split(".")[1])], gene.name
        else:
            assert gene.requires == (), gene.name
    for point in spaces.enumerate_all(make("toy", (2, 0, 1), Backend(("int8",)))[3]):
        kept = {2: {0, 2}, 1: {2}, 3: {0, 1, 2}}[point.value("depth")]
        assert {int(n.split(".")[1]) for n, _ in point.architecture if n.startswith("layers.")} == kept


def test_layers_that_the_least_depth_keeps_are_always_active():
    family, config, target, _ = make("bert")
    config.num_hidden_layers = 4
    space = network.search_space(family, config, Backend(), target, "model", (3, 1, 0, 2))
    requires = {g.name: g.requires for g in space.genes}
    assert next(g for g in space.genes if g.name == "depth").choices == (2, 3, 4)
    assert requires["layers.3.heads"] == requires["layers.1.mlp.precision"] == ()
    assert requires["layers.0.width"] == (("depth", 3),)
    assert requires["layers.2.attention.precision"] == (("depth", 4),)


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("refused", [((), ()), ((), ("int8",)), (("weight-int8",), ("int8",)), (("int8",), ())])
def test_a_space_for_two_targets_holds_the_space_of_each(name, refused):
    family, config, target, _ = make(name)
    other = Target(device="e", backend="made-up", workload=target.workload)
    backends = [Backend(names) for names in refused]
    space = network.shared_space(family, config, tuple(zip(backends, (target, other), strict=True)), "model", (2, 0, 1))
    for number, (backend, place) in enumerate(zip(backends, (target, other), strict=True)):
        assert spaces.of_targets(space, (number,)) == network.search_space(family, config, backend, place, "model", (2, 0, 1))
    point = spaces.uniform(space)
    for place, names in zip((target, other), refused, strict=True):
        used = {node.operator.precision.name for node in network.graph(family, config, space, point, place).nodes}
        assert not used & set(names)
        schemes = {s.scheme for s in family.segments(config) if s.scheme}
        assert schemes - set(names) <= used


def test_a_shared_width_fits_both_backends():
    family, config, target, _ = make("bert")
    config.intermediate_size = 96
    other = Target(device="e", backend="made-up", workload=target.workload)
    space = network.shared_space(family, config, ((Backend(width_multiple=4), target), (Backend(width_multiple=6), other)), "model")
    widths = {c for g in space.genes if g.name.endswith("width") for c in g.choices}
    assert len(widths) > 1
    assert [w for w in widths if w % 12] == []


@pytest.mark.parametrize("name", list(CASES))
def test_a_precision_that_the_backend_refuses_has_no_gene(name):
    family, config, _, full = make(name)
    quantizable = {s.name: s.scheme for s in family.segments(config) if s.scheme}
    assert {g.name.removesuffix(".precision") for g in full.genes if g.kind == "precision"} == set(quantizable)
    for refused in (("int8",), ("weight-int8",), ("int8", "weight-int8")):
        space = make(name, backend=Backend(refused))[3]
        left = {g.name.removesuffix(".precision"): g.choices for g in space.genes if g.kind == "precision"}
        assert left == {block: ("fp32", scheme) for block, scheme in quantizable.items() if scheme not in refused}
        assert {p.name for p in space.precisions} == {"fp32", *(s for s in quantizable.values() if s not in refused)}


def test_widths_are_multiples_of_what_the_backend_wants():
    for multiple in (4, 8, 16, 64):
        space = make("vit", backend=Backend(width_multiple=multiple))[3]
        widths = next(g.choices for g in space.genes if g.name == "layers.0.width")
        assert widths[-1] == 32  # the whole network is always a choice
        assert list(widths) == sorted(set(widths))
        assert all(w % multiple == 0 for w in widths[:-1])


# ---------------------------------------------------------------------------------------------- one candidate


def test_sizes_and_parameters_are_those_of_the_extracted_module(case):
    family, config, target, space = case
    model, rng = family.create(config), np.random.default_rng(0)
    for point in [spaces.largest(space), spaces.smallest(space), *(spaces.sample(space, rng) for _ in range(6))]:
        small = extract(model, family, config, space, point)
        graph = network.graph(family, config, space, point, target)
        assert sum(n.parameters for n in graph.nodes) == sum(p.numel() for p in small.parameters())
        kept = spaces.kept_layers(space, point)
        blocks = [f"layers.{i}.{kind}" for i in kept for kind in (("mlp",) if family.name == "toy" else ("attention", "mlp"))]
        assert [n.name for n in graph.nodes] == ["embedding", *blocks, "head"]
        # float32 everywhere, less three bytes a weight and four a row where a linear or a table was quantized
        want = 4 * sum(p.numel() for p in small.parameters())
        for module in small.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding) and (name := precision_of(small, module, kept, point, target.id)):
                assert name in ("int8", "weight-int8")
                want -= 3 * module.weight.numel() - 4 * module.weight.shape[0]
        assert sum(n.size_bytes for n in graph.nodes) == want


def precision_of(model, module, kept, point, target) -> str:
    """Quantized precision of a linear or table of an extracted module, told from its path alone; empty for FP32."""
    path = next(name for name, m in model.named_modules() if m is module)
    parts = path.split(".")
    if "word_embeddings" in parts:
        block = "embedding"
    elif digits := [part for part in parts if part.isdigit()]:
        layer = kept[int(digits[0])]
        attention = any(part in ("attention", "self_attn") for part in parts)
        block = f"layers.{layer}.{'attention' if attention else 'mlp'}"
    else:
        return ""
    name = point.precision_of(f"{block}.precision", target)
    return "" if name == "fp32" else name


def test_macs_are_those_that_pytorch_counts(case):
    family, config, target, space = case
    model, rng = family.create(config), np.random.default_rng(1)
    for point in [spaces.largest(space), spaces.smallest(space), *(spaces.sample(space, rng) for _ in range(4))]:
        small = extract(model, family, config, space, point)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            small(**feed(family, config))
        graph = network.graph(family, config, space, point, target)
        assert sum(n.macs for n in graph.nodes) * 2 == counter.get_total_flops()


def test_slices_keep_the_first_units_of_every_axis(case):
    family, config, _, space = case
    rng = np.random.default_rng(2)
    point = spaces.sample(space, rng)
    chosen = network.values(family, config, space, point)
    cut = network.slices(family, config, chosen)
    model = family.create(config)
    small = dict(extract(model, family, config, space, point).named_parameters())
    kept = spaces.kept_layers(space, point)
    for name, parameter in model.named_parameters():
        layer = next((int(part) for part in name.split(".") if part.isdigit()), None)
        if layer is not None and layer not in kept:
            continue
        value = parameter.detach()
        for axis, count in cut.get(name, ()):
            value = value.movedim(axis, 0)[:count].movedim(0, axis)
        path = name if layer is None else name.replace(f".{layer}.", f".{kept.index(layer)}.", 1)
        torch.testing.assert_close(small[path].detach(), value, rtol=0, atol=0)


def test_an_inactive_gene_has_its_largest_value():
    family, config, _, space = make("bert", (1, 0, 2))
    point = spaces.smallest(space)
    chosen = network.values(family, config, space, point)
    assert chosen["depth"] == 2
    assert chosen["layers.2.heads"] == 4
    assert chosen["layers.2.width"] == 32
    assert chosen["layers.1.heads"] == 2
    assert chosen["layers.1.width"] == 8


def test_quantized_weights_are_those_of_the_blocks_that_are_kept_and_quantized():
    family, config, target, space = make("bert", (1, 0, 2))
    genome = {slot: spaces.slot_gene(space, slot).choices[0] for slot in spaces.gene_names(space)}
    point = spaces.candidate(space, genome | {"layers.1.mlp.precision": "int8", "layers.2.mlp.precision": "int8"})
    assert network.quantized_weights(family, config, space, point, target.id) == {
        "bert.encoder.layer.1.intermediate.dense.weight": "int8",
        "bert.encoder.layer.1.output.dense.weight": "int8",
    }
    whole = network.quantized_weights(family, config, space, spaces.uniform(space), target.id)
    assert whole.pop("bert.embeddings.word_embeddings.weight") == "weight-int8"
    assert set(whole.values()) == {"int8"}
    assert len(whole) == 3 * 6


# ---------------------------------------------------------------------------------------------- what a table needs


@pytest.mark.parametrize("name", ["toy", "bert", "vit"])
def test_operators_are_exactly_what_the_candidates_of_the_space_execute(name):
    family, config = plugins.get("families", CASES[name][0]), CASES[name][1]()
    if name == "toy":
        config = ToyConfig(features=6, hidden=8, width=8, rank=4, layers=2)
    else:
        config.num_hidden_layers, config.num_attention_heads, config.intermediate_size = 2, 2, 16
    target = Target(device="d", backend="made-up", workload=family.workload(config, 1, SEQUENCE))
    space = network.search_space(family, config, Backend(), target, "model", (1, 0))
    executed = {
        node.operator for point in spaces.enumerate_all(space) for node in network.graph(family, config, space, point, target).nodes
    }
    listed = network.operators(family, config, space, target)
    assert len(listed) == len(set(listed))
    assert set(listed) == executed
    assert {o.precision for o in listed} == ({FLOAT32, INT8, WEIGHT_INT8} if name == "bert" else {FLOAT32, INT8})


def test_a_node_names_the_genes_that_shape_it():
    family, config, target, space = make("toy")
    graph = network.graph(family, config, space, spaces.largest(space), target)
    genes = {n.name: set(n.genes) for n in graph.nodes}
    assert genes["embedding"] == genes["head"] == {"hidden"}
    assert genes["layers.1.mlp"] == {"hidden", "layers.1.width", "layers.1.rank", "layers.1.mlp.precision"}
    changes = {"hidden": 4, "layers.1.width": 4, "layers.1.rank": 2, "layers.1.mlp.precision": "int8", "layers.2.width": 4}
    full = spaces.genome(space, spaces.largest(space))
    for gene, value in changes.items():
        other = network.graph(family, config, space, spaces.candidate(space, full | {gene: value}), target)
        assert [a.name for a, b in zip(graph.nodes, other.nodes, strict=True) if a.operator != b.operator] == [
            n.name for n in graph.nodes if gene in n.genes
        ]
    assert [(e.source, e.target) for e in graph.edges] == [(i - 1, i) for i in range(len(graph.nodes))]


# ---------------------------------------------------------------------------------------------- another target


class Gpu(Backend):
    name = "gpu"
    counterparts = {"fp32": FLOAT16, "int8": INT8_SYMMETRIC, "weight-int8": FLOAT16}  # noqa: RUF012


@pytest.mark.parametrize(
    ("precision", "wanted"),
    [
        ("as-searched", {"embedding": "fp16", "layers.0.mlp": "int8-symmetric", "head": "fp16", "rest": "fp16"}),
        ("fp16", {"embedding": "fp16", "head": "fp16", "rest": "fp16"}),
        ("int8", {"embedding": "fp16", "head": "fp16", "rest": "int8-symmetric"}),
    ],
)
def test_a_candidate_for_another_target_keeps_its_architecture(precision, wanted):
    family, config, target, space = make("bert", (2, 0, 1))
    genome = dict(spaces.genome(space, spaces.smallest(space))) | {"depth": 2, "layers.0.mlp.precision": "int8"}
    genome["embedding.precision"] = "weight-int8"
    point = spaces.candidate(space, genome)
    other = Target(device="gpu", backend="gpu", workload=target.workload)
    derived, found = network.retarget(family, config, space, point, Gpu(), other, precision)
    spaces.check(derived, found)
    assert derived.targets == (other.id,)
    assert found.architecture == point.architecture
    assert spaces.kept_layers(derived, found) == spaces.kept_layers(space, point) == (0, 2)
    blocks = {n.name: n.operator.precision.name for n in network.graph(family, config, derived, found, other).nodes}
    assert blocks == {name: wanted.get(name, wanted["rest"]) for name in blocks}
    assert len(blocks) == 6
    assert spaces.size(derived) == spaces.size(make("bert", (2, 0, 1), Backend(("int8", "weight-int8")))[3]), "no precision to choose"


def test_another_target_of_the_same_kind_changes_nothing_but_the_target():
    family, config, target, space = make("toy")
    point = spaces.uniform(space)
    other = Target(device="other", backend=target.backend, workload=target.workload)
    derived, found = network.retarget(family, config, space, point, Backend(), other)
    before, after = (network.graph(family, config, s, p, t) for s, p, t in ((space, point, target), (derived, found, other)))
    assert [(n.name, n.operator, n.size_bytes, n.macs) for n in before.nodes] == [
        (n.name, n.operator, n.size_bytes, n.macs) for n in after.nodes
    ]


def test_half_precision_is_half_the_bytes():
    family, config, target, space = make("vit")
    point = spaces.largest(space)
    derived, found = network.retarget(family, config, space, point, Gpu(), Target(device="gpu", backend="gpu", workload=target.workload))
    full, half = (network.graph(family, config, s, p, target_of) for s, p, target_of in (
        (space, point, target), (derived, found, Target(device="gpu", backend="gpu", workload=target.workload)),
    ))  # fmt: skip
    assert [2 * n.size_bytes for n in half.nodes] == [n.size_bytes for n in full.nodes]


def test_what_the_other_target_cannot_do_is_refused_by_block():
    family, config, target, space = make("toy")
    other = Target(device="other", backend="made-up", workload=target.workload)
    with pytest.raises(UnsupportedError, match="`made-up` cannot run embedding in fp16: not here") as caught:
        network.retarget(family, config, space, spaces.largest(space), Backend(("fp16",)), other, "fp16")
    assert caught.value.hint == "leave --precision out for what was searched"
    with pytest.raises(RecipeError, match="unknown precision of a build: int4"):
        network.retarget(family, config, space, spaces.largest(space), Backend(), other, "int4")


# ---------------------------------------------------------------------------------------------- other precisions


def test_a_space_offers_the_precisions_that_it_is_told_where_they_fit():
    family, config, target, plain = make("bert")
    backend = Backend(("weight-int4-block32",))
    named = ("int8-dynamic", "weight-int8", "weight-int4-block32", "weight-int4-block128")
    space = network.search_space(family, config, backend, target, "model", precisions=named)
    choices = {gene.name: gene.choices for gene in space.genes if gene.kind == "precision"}
    assert choices["embedding.precision"] == ("fp32", "weight-int8")
    assert {choices[name] for name in choices if name.startswith("layers.")} == {("fp32", "int8-dynamic", "weight-int4-block128")}
    assert {p.name for p in space.precisions} == {"fp32", *named} - {"weight-int4-block32"}
    assert network.search_space(family, config, Backend(), target, "model", precisions=network.SEARCHED) == plain
    none = network.search_space(family, config, Backend(), target, "model", precisions=())
    assert not [gene for gene in none.genes if gene.kind == "precision"]
    listed = network.operators(family, config, space, target)
    assert {o.precision.name for o in listed if o.kind == "mlp"} == set(choices["layers.0.mlp.precision"])


@pytest.mark.parametrize("precision", ["int8", "int8-dynamic", "weight-int4-block32"])
def test_a_build_of_a_named_precision_is_of_it_where_it_can_be(precision):
    family, config, target, space = make("bert")
    other = Target(device="other", backend="made-up", workload=target.workload)
    derived, found = network.retarget(family, config, space, spaces.largest(space), Backend(), other, precision)
    blocks = {n.name: n.operator.precision.name for n in network.graph(family, config, derived, found, other).nodes}
    assert {blocks.pop("embedding"), blocks.pop("head")} == {"weight-int8", "fp32"}
    assert set(blocks.values()) == {precision}


@pytest.mark.parametrize(("bits", "size", "columns", "groups"), [(4, 32, 64, 2), (4, 32, 65, 3), (8, 128, 64, 1), (8, 32, 33, 2)])
def test_bytes_of_groups(bits, size, columns, groups):
    segment = Segment("s", "mlp", "m", 0, None, ("w", "b"), ("w",), "int8")
    said = network.block_bytes(segment, {"w": (10, columns), "b": (10,)}, weight_only(bits, size))
    assert said == 10 * groups * (size * bits // 8 + 4) + 40


def test_a_backend_without_floats_has_a_space_of_integers():
    """Every block has them, those without a gene too, and a table of it has no other rows."""
    family, config, target, space = make("vit", backend=Backend(refused=("fp32", "weight-int8")))
    assert space.precisions == (INT8,)
    assert {gene.choices for gene in space.genes if gene.kind == "precision"} == {("int8",)}
    whole = spaces.largest(space)
    assert whole == spaces.uniform(space)
    assert {node.operator.precision for node in network.graph(family, config, space, whole, target).nodes} == {INT8}
    assert {operator.precision for operator in network.operators(family, config, space, target)} == {INT8}
    assert spaces.of_targets(space, (0,)) == space
    with pytest.raises(UnsupportedError, match="none of the precisions to search can be run: weight-int8") as caught:
        network.search_space(family, config, Backend(refused=("fp32", "weight-int8")), target, "model", precisions=("weight-int8",))
    assert caught.value.detail == "made-up: not here"


def test_candidates_move_between_floats_and_integers():
    """What no search quantizes is in integers where there is nothing else, and float again where there is."""
    family, config, target, space = make("vit")
    point, integers = spaces.uniform(space), Backend(refused=("fp32", "weight-int8"))
    other = Target(device="e", backend="made-up", workload=target.workload)
    there, moved = network.retarget(family, config, space, point, integers, other)
    assert {n.operator.precision.name for n in network.graph(family, config, there, moved, other).nodes} == {"int8"}
    back, again = network.retarget(family, config, there, moved, Backend(), target)
    before = network.graph(family, config, space, point, target)
    assert [n.operator for n in network.graph(family, config, back, again, target).nodes] == [n.operator for n in before.nodes]
    with pytest.raises(UnsupportedError, match=r"cannot run layers\.0\.attention in fp32"):
        network.retarget(family, config, space, spaces.largest(space, "fp32"), integers, other)

"""What is counted of a manifest before it is believed: configurations, spaces and networks that are none, or too many."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from transformers import BertConfig, ViTConfig

from nascompile import kit_limits, network, plugins, space as spaces
from nascompile.errors import RecordError
from nascompile.families.toy import PLUGIN as TOY, ToyConfig
from nascompile.records import FLOAT32, INT8, Gene, Target, Workload

CONFIG = ToyConfig()
TARGET = Target(device="board", backend="fake", workload=Workload())
SPACE = network.search_space(TOY, CONFIG, plugins.get("backends", "fake"), TARGET, "")


def check(space=SPACE, config=CONFIG, **given):
    options = {"networks": 10, "timed": ()} | given
    kit_limits.check_space(TOY, config, space, TARGET, **options)


def refused(space=SPACE, **given) -> str:
    with pytest.raises(RecordError) as caught:
        check(space, **given)
    return caught.value.detail


def with_gene(name, /, **changes):
    genes = tuple(msgspec.structs.replace(g, **changes) if g.name == name else g for g in SPACE.genes)
    return msgspec.structs.replace(SPACE, genes=genes)


DEEP = BertConfig(num_hidden_layers=48)


@pytest.mark.parametrize(
    ("family", "config", "tokens"),
    [("toy", CONFIG, 0), ("bert", BertConfig(), 128), ("vit", ViTConfig(num_labels=1000), 0), ("bert", DEEP, 512)],
)
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_real_models_are_far_below_the_limits(family, config, tokens, backend):
    family = plugins.get("families", family)
    target = msgspec.structs.replace(TARGET, workload=family.workload(config, 1, tokens))
    names = network.product_precisions()
    space = network.search_space(family, config, plugins.get("backends", backend), target, "", (), names)
    kit_limits.check_config(config.to_dict())
    kit_limits.check_space(family, config, space, target, 10)
    kit_limits.check_space(family, config, network.half_space(family, config, space), target, 10)
    counted = kit_limits.operators(family, config, space)
    assert len(network.operators(family, config, space, target)) <= counted < kit_limits.OPERATORS / 2


def test_operators_are_counted_as_they_are_expanded():
    """The toy has no two operators alike in one block, and its blocks are alike."""
    blocks = sum(s.kind == "mlp" for s in TOY.segments(CONFIG))
    found = network.operators(TOY, CONFIG, SPACE, TARGET)
    alike = sum(o.kind == "mlp" for o in found)
    assert kit_limits.operators(TOY, CONFIG, SPACE) == len(found) + (blocks - 1) * alike


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"num_hidden_layers": 65}, "'num_hidden_layers' = 65: at most 64"),
        ({"n_layers": -(10**6)}, "'n_layers' = -1,000,000: at most 64"),
        ({"vision": {"layers": [1, 1000]}}, "'layers' = 1,000: at most 64"),
        ({"vocab_size": 2**20 + 1}, "'vocab_size' = 1,048,577: at most 1,048,576"),
        ({"hidden_size": 10**30}, "'hidden_size' = a number of 100 bits: at most"),
        ({"id2label": dict.fromkeys(map(str, range(200_001)), "x")}, "more than 200,000 values"),
        ({"a": [[[[[[[[[1]]]]]]]]]}, "'a': nested deeper than 8"),
    ],
)
def test_configurations_of_no_model_are_refused(config, says):
    with pytest.raises(RecordError, match="kits are not made for such a model") as caught:
        kit_limits.check_config(config)
    assert says in caught.value.detail
    assert caught.value.hint == kit_limits.OWN_KIT


def test_numbers_that_are_no_counts_are_not_taken_for_some():
    kit_limits.check_config({"layer_norm_eps": 1e-12, "layer_types": ["a"] * 99, "use_layers": True, "id2label": {"0": "layer"}})


INT3 = msgspec.structs.replace(INT8, name="int3")
REQUIRED = (("depth", 2), ("hidden", 16))


@pytest.mark.parametrize(
    ("space", "says"),
    [
        (with_gene("hidden", choices=(16, 16)), "hidden: its choices do not ascend from 1 to 32 at most"),
        (with_gene("hidden", choices=(0, 16)), "hidden: its choices do not ascend"),
        (with_gene("hidden", choices=(16, 10**18)), "hidden: its choices do not ascend"),
        (with_gene("hidden", choices=("16", 32)), "hidden: its choices do not ascend"),
        (with_gene("hidden", choices=()), "hidden: its choices do not ascend"),
        (with_gene("layers.0.mlp.precision", choices=("fp32", "int4")), "its choices are not different precisions of the space"),
        (with_gene("layers.0.mlp.precision", choices=("fp32",) * 1000), "its choices are not different precisions of the space"),
        (with_gene("layers.0.mlp.precision", name="layers.7.mlp.precision"), "'layers.7.mlp.precision': no precision gene of the model"),
        (with_gene("layers.0.rank", kind="precision"), "'layers.0.rank': no precision gene of the model"),
        (with_gene("layers.0.rank", requires=REQUIRED), "layers.0.rank: it can require a depth and nothing else"),
        (msgspec.structs.replace(SPACE, genes=(*SPACE.genes, SPACE.genes[0])), "a gene is named twice"),
        (msgspec.structs.replace(SPACE, layer_order=(0, 1, 2, 2)), "layer_order does not name each of 4 layers once"),
        (msgspec.structs.replace(SPACE, layer_order=tuple(range(10**6))), "layer_order does not name each of 4 layers once"),
        (msgspec.structs.replace(SPACE, targets=("other",)), "it is not for the kit's target alone"),
        (msgspec.structs.replace(SPACE, precisions=(FLOAT32, INT8, INT8)), "a precision is named twice"),
        (msgspec.structs.replace(SPACE, precisions=(FLOAT32, INT3)), "precision 'int3': none of this version"),
    ],
)
def test_spaces_that_are_not_the_models_are_refused(space, says):
    assert says in refused(space)


def test_all_faults_are_said_and_no_endless_list_of_them():
    genes = tuple(Gene(name=f"g{i}", kind="architecture", choices=(1,)) for i in range(1000))
    lines = refused(msgspec.structs.replace(SPACE, genes=genes, layer_order=())).splitlines()
    assert len(lines) == kit_limits.SAID + 1
    assert lines[-1] == "and 981 more"


def test_too_many_networks_are_refused_and_so_are_foreign_ones():
    point = spaces.sample(SPACE, np.random.default_rng(0))
    check(timed=(point,) * 100)
    assert "windows hold 101 whole networks: at most 100" in refused(timed=(point,) * 101)
    assert "by 101 whole networks" in refused(networks=101)
    assert "belongs to another space" in refused(timed=(msgspec.structs.replace(point, space="x"),))
    values = tuple((name, 31 if name == "hidden" else value) for name, value in point.architecture)
    assert "hidden = 31 is not a choice" in refused(timed=(msgspec.structs.replace(point, architecture=values),))

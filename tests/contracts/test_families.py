"""What every family promises about every model type it names."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import BertConfig, DistilBertConfig, RobertaConfig, ViTConfig, XLMRobertaConfig

from nascompile import plugins
from nascompile.errors import NascompileError
from nascompile.families.mcu_vit import McuVitConfig
from nascompile.families.toy import ToyConfig
from nascompile.records import FLOAT32, Operator

torch.set_num_threads(1)

SIZES = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 32, "num_labels": 3}
TEXT = {"vocab_size": 40, "max_position_embeddings": 20}
SMALL = {
    "vit": lambda: ViTConfig(**SIZES, image_size=8, patch_size=4, num_channels=1),
    "bert": lambda: BertConfig(**SIZES, **TEXT),
    "roberta": lambda: RobertaConfig(**SIZES, **TEXT),
    "xlm-roberta": lambda: XLMRobertaConfig(**SIZES, **TEXT),
    "distilbert": lambda: DistilBertConfig(dim=16, n_layers=4, n_heads=4, hidden_dim=32, num_labels=3, **TEXT),
    "mcu_vit": lambda: McuVitConfig(
        image_size=16, image_sizes=(8, 16), patch_sizes=(4, 8), num_channels=1, hidden_size=32, hidden_sizes=(24, 32), num_hidden_layers=4,
        num_attention_heads=4, head_dim=8, heads=(2, 4), intermediate_size=64, widths=(32, 64), ranks=(4, 8, 32), num_labels=3,
    ),
    "nascompile-toy": lambda: ToyConfig(features=6, hidden=8, width=16, rank=4, layers=4, num_labels=3),
}
"""A new model type adds a line here."""
TYPES = [(name, kind) for name in plugins.names("families") for kind in plugins.get("families", name).model_types]


@pytest.fixture(params=TYPES, ids="-".join)
def pair(request):
    name, kind = request.param
    assert kind in SMALL, f"add a small configuration of {kind} to SMALL"
    torch.manual_seed(0)
    return plugins.get("families", name), SMALL[kind]()


def values_of(family, config, end=-1):
    """Every gene at its last choice, of the largest network, or at its first."""
    return {gene: choices[end] for gene, choices in family.choices(config, 8).items()}


def feed(family, config, batch=2, sequence=5):
    found = {}
    for spec in family.inputs(config):
        shape = [{"batch": batch, "sequence": sequence}.get(d, d) for d in spec.shape]
        found[spec.name] = torch.ones(shape, dtype=torch.long) if spec.high else torch.randn(shape)
        assert str(found[spec.name].dtype) == f"torch.{spec.dtype}"
    return found


def test_no_model_type_belongs_to_two_families():
    kinds = [kind for _, kind in TYPES]
    assert len(kinds) == len(set(kinds))


def test_parameters_are_those_of_the_model_and_cost_no_memory(pair):
    family, config = pair
    model = family.create(config)
    assert not model.training
    assert family.parameters(config) == {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert family.unsupported(config) == ""


def test_every_parameter_is_in_exactly_one_block(pair):
    family, config = pair
    segments = family.segments(config)
    listed = [p for s in segments for p in s.parameters]
    assert sorted(listed) == sorted(family.parameters(config))
    assert len({s.name for s in segments}) == len(segments)
    assert segments[0].start is None
    assert all(s.start is not None and s.start[0] in family.parameters(config) for s in segments[1:])
    modules = dict(family.create(config).named_modules())
    for s in segments:
        assert s.module in modules
        assert set(s.quantizable) <= set(s.parameters)
        assert bool(s.quantizable) == bool(s.scheme)
        assert s.scheme == "" or s.scheme.replace("-", "_") in plugins.names("quantization")
        if s.layer is not None:
            assert s.name.startswith(f"layers.{s.layer}.")
            assert all(f".{s.layer}." in p for p in s.parameters)
    layers = [s.layer for s in segments if s.layer is not None]
    assert layers == sorted(layers)
    assert sorted(set(layers)) == list(range(4))


def test_groups_fit_the_axes_they_slice_and_the_genes_that_slice_them(pair):
    family, config = pair
    shapes, choices = family.parameters(config), family.choices(config, 8)
    groups = family.groups(config)
    unsliced = set(getattr(family, "unsliced", ()))
    assert {g.gene for g in groups} | {"depth"} | unsliced == set(choices)
    assert not unsliced & {g.gene for g in groups}
    assert len({g.gene for g in groups}) == len(groups)
    axes = [member for g in groups for member in g.members]
    assert len(axes) == len(set(axes))  # no axis is cut by two genes
    for g in groups:
        assert max(choices[g.gene]) == g.count
        for parameter, axis in g.members:
            assert shapes[parameter][axis] == g.unit * g.count, parameter
        assert (g.layer is None) == (not g.gene.startswith("layers."))
    for gene, values in choices.items():
        assert list(values) == sorted(set(values), reverse=gene == "patch")  # smaller patches make a larger network
        assert min(values) >= 1
    assert max(choices["depth"]) == 4


def test_the_forward_reads_nothing_beyond_what_a_candidate_keeps(pair):
    """Not-a-numbers planted in everything that the smallest network drops."""
    family, config = pair
    model, values, inputs = family.create(config), values_of(family, config, 0), feed(family, config)
    layers = (3, 1, 0, 2)[: values["depth"]]

    def linear(name, x, weight, bias):
        if x.is_floating_point():
            return torch.nn.functional.linear(x, weight, bias)
        return torch.nn.functional.embedding(x, weight)

    with torch.no_grad():
        before = family.forward(model, inputs, tuple(sorted(layers)), values, linear)
        for group in family.groups(config):
            for name, axis in group.members:
                parameter = dict(model.named_parameters())[name]
                parameter.narrow(axis, group.unit * values[group.gene], group.unit * (group.count - values[group.gene])).fill_(float("nan"))
        for s in family.segments(config):
            if s.layer is not None and s.layer not in layers:
                for name in s.parameters:
                    dict(model.named_parameters())[name].fill_(float("nan"))
        after = family.forward(model, inputs, tuple(sorted(layers)), values, linear)
    assert torch.isfinite(before).all()
    assert before.shape == (2, 3)
    assert torch.equal(before, after)


def test_every_quantizable_product_and_no_other_goes_through_linear(pair):
    family, config = pair
    model, seen = family.create(config), {}

    def linear(name, x, weight, bias):
        seen[name] = tuple(weight.shape)
        if not x.is_floating_point():
            return torch.nn.functional.embedding(x, weight)
        return torch.nn.functional.linear(x, weight, bias)

    values = values_of(family, config, 0)
    family.forward(model, feed(family, config), (1, 3), values, linear)
    wanted = {w for s in family.segments(config) if s.layer in (None, 1, 3) for w in s.quantizable}
    assert set(seen) == wanted
    cut = {name: list(family.parameters(config)[name]) for name in seen}
    for group in family.groups(config):
        for name, axis in group.members:
            if name in cut:
                cut[name][axis] = group.unit * values[group.gene]
    assert seen == {name: tuple(shape) for name, shape in cut.items()}


def test_operators_are_records_that_count_their_work(pair):
    family, config = pair
    workload = family.workload(config, 2, 5)
    full, small = values_of(family, config), values_of(family, config, 0)
    for s in family.segments(config):
        operator = family.operator(config, s, full, workload, FLOAT32)
        assert isinstance(operator, Operator)
        assert operator.dim("batch") == workload.batch == 2
        assert operator == family.operator(config, s, dict(full), workload, FLOAT32)
        # a look-up multiplies nothing, all else does
        assert family.macs(operator) > 0 or s.scheme == "weight-int8"
        assert family.macs(family.operator(config, s, small, workload, FLOAT32)) <= family.macs(operator)
        twice = family.operator(config, s, full, family.workload(config, 4, 5), FLOAT32)
        assert family.macs(twice) == 2 * family.macs(operator)
        assert 0 < family.activations(family.operator(config, s, small, workload, FLOAT32)) <= family.activations(operator)
        assert family.activations(twice) == 2 * family.activations(operator)
        if s.layer is not None:
            other = next(o for o in family.segments(config) if o.kind == s.kind and o.layer not in (None, s.layer))
            assert family.operator(config, other, full, workload, FLOAT32) == operator  # equal layers share a row of the table


def test_a_model_comes_back_from_its_folder_with_its_weights(pair, tmp_path):
    family, config = pair
    model = family.create(config)
    model.save_pretrained(tmp_path)
    again = family.load(str(tmp_path))
    assert not again.training
    for (name, a), (other, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a, b)
        assert b.dtype == torch.float32


def test_pickled_weights_are_refused(pair, tmp_path):
    family, config = pair
    model = family.create(config)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises((OSError, NascompileError)):
        family.load(str(tmp_path))


def test_a_new_head_can_be_asked_for(pair, tmp_path):
    family, config = pair
    family.create(config).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == config.model_type
    model = family.load(str(tmp_path), num_labels=7)
    inputs = feed(family, model.config)
    assert model(**inputs).logits.shape == (2, 7)
    assert np.isfinite(model(**inputs).logits.detach().numpy()).all()

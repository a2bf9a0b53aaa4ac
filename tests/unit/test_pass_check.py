"""Passes seen from outside: graphs made by lowering are run between passes, and a pass that lies about itself is caught."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from transformers import BertConfig

from nascompile import lowering, network, pass_check, plugins, space as spaces
from nascompile.errors import ModelError
from nascompile.families.toy import ToyConfig
from nascompile.quantization import ActivationRanges
from nascompile.records import Target

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
CASES = {
    "toy-fake": lambda: ToyConfig(layers=2),
    "bert-onnxruntime": lambda: BertConfig(**SIZES, vocab_size=50, num_labels=3, max_position_embeddings=24),
}


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    torch.set_num_threads(1)
    folder, found = tmp_path_factory.mktemp("blueprints"), {}
    for name, config in CASES.items():
        family = plugins.get("families", name.partition("-")[0])
        found[name] = (family, config(), lowering.export(family, config(), folder))
    return found


def check(exports, name, folder, pick=spaces.uniform):
    """The checks of a candidate, lowered under watch."""
    family, config, path = exports[name]
    backend = plugins.get("backends", name.partition("-")[2])
    torch.manual_seed(3)
    weights = {n: p.detach().numpy() * 3 for n, p in family.create(config).named_parameters()}
    target = Target(device="cpu", backend=backend.name, workload=family.workload(config, 1, 8), session=backend.session())
    space = network.search_space(family, config, backend, target, "model")
    sites = {p for s in family.segments(config) for p in s.quantizable}
    ranges = ActivationRanges(method="minmax", sites=tuple((p, -4.0, 4.0) for p in sorted(sites)))
    rng, feed = np.random.default_rng(0), {}
    for spec in family.inputs(config):
        shape = [{"batch": 3, "sequence": 7}.get(d, d) for d in spec.shape]
        feed[spec.name] = rng.integers(0, spec.high, shape) if spec.high else rng.standard_normal(shape).astype(np.float32)
    feed |= {"attention_mask": np.ones((3, 7), np.int64)} if "attention_mask" in feed else {}
    watch = pass_check.PassChecker(folder, weights | feed)
    blueprint = lowering.blueprint(family, config, path, backend, watch)
    lowering.lower(blueprint, family, config, space, pick(space), target, weights, ranges, backend, watch)
    return watch.finish()


@pytest.mark.parametrize("name", CASES)
def test_every_pass_is_run_and_does_what_it_says_of_itself(exports, name, tmp_path):
    checks = check(exports, name, tmp_path / "graphs")
    backend = plugins.get("backends", name.partition("-")[2])
    listed = [n for n in lowering.STRUCTURE_PASSES + lowering.PASSES if plugins.get("passes", n).standard or n in backend.passes]
    assert [c.name for c in checks] == listed
    assert [c.part for c in checks] == ["structure" if n in lowering.STRUCTURE_PASSES else "candidate" for n in listed]
    by_name = {c.name: c for c in checks}
    rounding = by_name["quantize_linear"]
    assert (rounding.exact, rounding.accepted) == (False, None)
    assert 10 < rounding.sqnr_db < 60  # 8 bits
    moved = {c.name: c.max_abs for c in checks if c.exact}
    assert max(moved.values()) < 0.2 * rounding.max_abs
    for c in checks:
        assert len(onnx.load(tmp_path / "graphs" / c.file).graph.node) == c.nodes[1]
    structure = sum(c.part == "structure" for c in checks)
    assert all((c.max_abs, c.sqnr_db) == (0, None) for c in checks if c.file[3:] != f"{c.name}.onnx")
    names = sorted(p.name for p in (tmp_path / "graphs").iterdir())
    own = {c.file for c in checks if c.file[3:] == f"{c.name}.onnx"}
    assert names == sorted([*own, "00-exported.onnx", f"{1 + structure:02d}-sliced.onnx", "passes.json"])
    assert [row["name"] for row in json.loads((tmp_path / "graphs" / "passes.json").read_text())] == listed


def test_a_float_candidate_is_rounded_by_nothing(exports, tmp_path):
    checks = check(exports, "bert-onnxruntime", tmp_path, spaces.largest)
    assert max(c.max_abs for c in checks) < 1e-5
    by_name = {c.name: c for c in checks}
    assert (by_name["quantize_linear"].max_abs, by_name["quantize_linear"].sqnr_db) == (0, None)
    assert by_name["inline_constants"].nodes[0] > by_name["inline_constants"].nodes[1]


SPOILT = [("toy-fake", "split_gemm", 0.999), ("bert-onnxruntime", "fuse_integer_matmul", 1.01), ("toy-fake", "inline_constants", np.nan)]


@pytest.mark.parametrize(("name", "broken", "factor"), SPOILT)
def test_an_exact_pass_that_changes_the_function_is_named(exports, name, broken, factor, tmp_path, monkeypatch):
    step = plugins.get("passes", broken)
    apply = type(step).apply

    def spoil(self, model, context):
        """One number of the graph, or one tensor on its way, is a little off."""
        model = apply(self, model, context)
        if broken == "fuse_integer_matmul":
            tensor = next(t for t in model.graph.initializer if t.name.endswith(("out.weight.T", "output.dense.weight.T")))
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), tensor.name))
        else:
            (output,) = model.graph.node[-1].output
            model.graph.node[-1].output[0] = "unscaled"
            model.graph.initializer.append(numpy_helper.from_array(np.float32(factor), "spoilt"))
            model.graph.node.append(onnx.helper.make_node("Mul", ["unscaled", "spoilt"], [output]))
        return model

    monkeypatch.setattr(type(step), "apply", spoil)
    with pytest.raises(ModelError, match=f"pass {broken} changed what the network computes") as error:
        check(exports, name, tmp_path, spaces.largest)
    assert f"-{broken}.onnx in" in error.value.hint


def test_a_graph_that_does_not_run_is_named(tmp_path):
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("NoSuchOperator", ["x"], ["y"])], "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2])],
    )  # fmt: skip
    watch = pass_check.PassChecker(tmp_path, {"x": np.ones(2, np.float32)})
    with pytest.raises(ModelError, match=r"00-exported\.onnx"):
        watch(None, onnx.helper.make_model(graph))

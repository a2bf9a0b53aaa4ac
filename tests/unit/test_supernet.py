"""The super-network against Hugging Face's own forward, its emulated quantization against integers in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import BertConfig, DistilBertConfig, RobertaConfig, ViTConfig

from nascompile import network, plugins, space as spaces
from nascompile.families.mcu_vit import McuVitConfig
from nascompile.families.toy import ToyConfig
from nascompile.quantization import ActivationRanges
from nascompile.records import Target
from nascompile.supernet import (
    FakeQuantizer,
    Observer,
    Subnet,
    Supernet,
    calibrate,
    divergence,
    emulate,
    extract,
    importance,
    layer_order,
    reorder,
)

torch.set_num_threads(1)

TEXT = {"vocab_size": 40, "num_labels": 3, "max_position_embeddings": 20, "pad_token_id": 1}
SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 32}
CASES = {
    "vit": ("vit", lambda: ViTConfig(**SIZES, image_size=8, patch_size=4, num_channels=1, num_labels=3)),
    "bert": ("bert", lambda: BertConfig(**SIZES, **TEXT)),
    "roberta": ("bert", lambda: RobertaConfig(**SIZES, **TEXT)),
    "distilbert": ("bert", lambda: DistilBertConfig(dim=16, n_layers=3, n_heads=4, hidden_dim=32, **TEXT)),
    "mcu_vit": ("mcu_vit", lambda: McuVitConfig(
        image_size=8, num_channels=1, image_sizes=(4, 8), patch_sizes=(2, 4), hidden_size=32, hidden_sizes=(16, 32), num_hidden_layers=3,
        num_attention_heads=4, head_dim=4, intermediate_size=32, widths=(16, 32), ranks=(8, 32), num_labels=3,
    )),
    "toy": ("toy", lambda: ToyConfig(features=6, hidden=8, width=16, rank=4, layers=3, num_labels=3)),
}
ATOL = 1e-5
"""Logits are of order 1 and come from a few layers of float32 sums of at most 32 terms (2⁻²⁴ each), taken in another order."""


class Backend:
    name, width_multiple = "made-up", 8

    def supports(self, precision) -> str:
        return ""


class Case:
    def __init__(self, name: str, order: tuple[int, ...] = (2, 0, 1)) -> None:
        family, config = CASES[name]
        self.name, self.family, self.config = name, plugins.get("families", family), config()
        torch.manual_seed(5)
        self.model = self.family.create(self.config)
        with torch.no_grad():
            for parameter in self.model.parameters():  # HF starts biases at 0 and norms at 1, where mistakes would not show
                parameter.add_(0.2 * torch.randn_like(parameter))
        self.net = Supernet(self.family, self.model)
        self.target = Target(device="d", backend="made-up", workload=self.family.workload(self.config, 1, 9))
        self.space = network.search_space(self.family, self.config, Backend(), self.target, "model", order)

    def batch(self, seed: int = 0, batch: int = 4, sequence: int = 9) -> dict[str, torch.Tensor]:
        """Inputs; in text every sample but the first has padding at its end, as long as its number."""
        rng, found = torch.Generator().manual_seed(seed), {}
        for spec in self.family.inputs(self.config):
            shape = [{"batch": batch, "sequence": sequence}.get(d, d) for d in spec.shape]
            low = 2 if spec.name == "input_ids" else 0
            found[spec.name] = torch.randint(low, spec.high, shape, generator=rng) if spec.high else torch.randn(shape, generator=rng)
        if "attention_mask" in found:
            real = torch.arange(sequence)[None] < sequence - torch.arange(batch)[:, None]
            found["attention_mask"] = real.long()
            found["input_ids"] = torch.where(real, found["input_ids"], TEXT["pad_token_id"])
        return found


@pytest.fixture(params=list(CASES))
def case(request):
    return Case(request.param)


def logits_of(output):
    return output.logits.detach()


# ---------------------------------------------------------------------------------------------- elastic forward


def test_the_largest_network_is_the_hugging_face_model(case):
    with torch.no_grad():
        for seed, shape in enumerate(((4, 9), (1, 5), (3, 12))):
            inputs = case.batch(seed, *shape)
            want = case.model(**inputs).logits
            torch.testing.assert_close(case.net(inputs, case.net.largest()), want, rtol=0, atol=ATOL)
            torch.testing.assert_close(case.net(inputs, case.net.subnet(case.space, spaces.largest(case.space))), want, rtol=0, atol=ATOL)
    assert want.std() > 0.05  # not a constant that anything would agree with


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
def test_padding_does_not_show(name):
    case = Case(name)
    whole = case.batch(batch=3)
    for row, length in ((1, 8), (2, 7)):
        alone = {key: value[row : row + 1, :length] for key, value in whole.items()}
        rng = np.random.default_rng(row)
        for point in (spaces.largest(case.space), spaces.sample(case.space, rng)):
            subnet = case.net.subnet(case.space, point)
            with torch.no_grad():
                torch.testing.assert_close(case.net(alone, subnet)[0], case.net(whole, subnet)[row], rtol=0, atol=ATOL)


def test_extraction_is_the_masked_super_network_for_50_random_candidates(case):
    rng, different = np.random.default_rng(11), set()
    inputs = case.batch(3)
    with torch.no_grad():
        for _ in range(50):
            point = spaces.sample(case.space, rng)
            got = case.net(inputs, case.net.subnet(case.space, point))
            small = extract(case.model, case.family, case.config, case.space, point)
            torch.testing.assert_close(logits_of(small(**inputs)), got, rtol=0, atol=ATOL)
            different.add(tuple(got.flatten().tolist()))
    assert len(different) > 25  # the candidates are different functions


@pytest.mark.parametrize("name", ["vit", "bert", "roberta", "distilbert"])
def test_a_candidate_is_the_full_network_with_the_rest_set_to_zero(name):
    """Masking done by hand on the full model, Hugging Face's own forward; heads and neurons only: a layer cannot be masked by zeros."""
    case = Case(name)
    rng = np.random.default_rng(4)
    inputs = case.batch(1)
    for _ in range(5):
        point = spaces.sample(case.space, rng)
        genome = spaces.genome(case.space, point) | {"depth": 3}
        chosen = {name: int(genome[name]) for name in genome if not name.endswith("precision")}
        masked = case.family.create(case.config)
        masked.load_state_dict(case.model.state_dict())
        state = dict(masked.named_parameters())
        with torch.no_grad():
            for i in range(3):
                out, second = (name.format(i) for name in OUTS[case.name])
                state[out][:, chosen[f"layers.{i}.heads"] * 4 :] = 0
                state[second][:, chosen[f"layers.{i}.width"] :] = 0
            got = case.net(inputs, Subnet((0, 1, 2), chosen))
            torch.testing.assert_close(got, masked(**inputs).logits, rtol=0, atol=ATOL)


OUTS = {
    "vit": ("vit.layers.{}.attention.o_proj.weight", "vit.layers.{}.mlp.fc2.weight"),
    "bert": ("bert.encoder.layer.{}.attention.output.dense.weight", "bert.encoder.layer.{}.output.dense.weight"),
    "roberta": ("roberta.encoder.layer.{}.attention.output.dense.weight", "roberta.encoder.layer.{}.output.dense.weight"),
    "distilbert": ("distilbert.transformer.layer.{}.attention.out_lin.weight", "distilbert.transformer.layer.{}.ffn.lin2.weight"),
}


def test_the_forward_keeps_no_choice_between_calls(case):
    inputs = case.batch()
    big, small = (case.net.subnet(case.space, p) for p in (spaces.largest(case.space), spaces.smallest(case.space)))
    with torch.no_grad():
        first = case.net(inputs, big)
        case.net(inputs, small)
        assert torch.equal(case.net(inputs, big), first)


def test_extraction_leaves_the_super_network_alone(case):
    before = {name: p.detach().clone() for name, p in case.model.named_parameters()}
    config = case.model.config.to_dict()
    small = extract(case.model, case.family, case.config, case.space, spaces.smallest(case.space))
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    assert all(torch.equal(p, before[name]) for name, p in case.model.named_parameters())
    assert case.model.config.to_dict() == config


@pytest.mark.parametrize("name", list(CASES))
def test_a_uniform_candidate_opens_with_the_stock_from_pretrained(name, tmp_path):
    """Fewer layers and narrower MLPs; fewer heads of the same size have no place in the configurations."""
    case = Case(name)
    narrow = {slot: 16 if name != "toy" else 8 for slot in spaces.gene_names(case.space) if slot.endswith("width")}
    if name == "toy":
        narrow |= {"hidden": 4} | {f"layers.{i}.rank": 2 for i in range(3)}
    genome = spaces.genome(case.space, spaces.largest(case.space)) | {"depth": 2} | narrow
    point = spaces.candidate(case.space, genome)
    small = extract(case.model, case.family, case.config, case.space, point)
    small.save_pretrained(tmp_path)
    again = type(case.model).from_pretrained(tmp_path).eval() if name != "toy" else case.family.load(str(tmp_path))
    inputs = case.batch()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, small(**inputs).logits, rtol=0, atol=ATOL)
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".safetensors"]


# ---------------------------------------------------------------------------------------------- importance


def test_reordering_changes_weights_but_not_the_function(case):
    inputs = case.batch()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        before = case.net(inputs, case.net.largest())
        weights = {n: p.detach().clone() for n, p in case.model.named_parameters()}
        reorder(case.net, {g.gene: rng.standard_normal(g.count) for g in case.family.groups(case.config)})
        moved = [n for n, p in case.model.named_parameters() if not torch.equal(p, weights[n])]
        torch.testing.assert_close(case.net(inputs, case.net.largest()), before, rtol=0, atol=ATOL)
        torch.testing.assert_close(case.model(**inputs).logits, before, rtol=0, atol=ATOL)
    assert {m for g in case.family.groups(case.config) for m, _ in g.members} == set(moved)


def test_equal_scores_keep_their_order():
    case = Case("vit")
    weights = {n: p.detach().clone() for n, p in case.model.named_parameters()}
    reorder(case.net, {g.gene: np.zeros(g.count) for g in case.family.groups(case.config)})
    assert all(torch.equal(p, weights[n]) for n, p in case.model.named_parameters())


@pytest.mark.parametrize("name", list(OUTS))
def test_importance_finds_units_that_do_nothing(name):
    """Planted: heads and neurons whose outgoing weights are zero. Sorted, they are what the smallest widths leave out."""
    case = Case(name)
    useless = {"heads": [0, 2], "width": list(range(0, 32, 4))}
    state = dict(case.model.named_parameters())
    with torch.no_grad():
        for i in range(3):
            out, second = (path.format(i) for path in OUTS[name])
            for head in useless["heads"]:
                state[out][:, head * 4 : head * 4 + 4] = 0
            state[second][:, useless["width"]] = 0
    batches = [(case.batch(seed), torch.tensor([0, 1, 2, 1])) for seed in (1, 2)]
    before = case.net(case.batch(), case.net.largest()).detach()
    scores = importance(case.net, batches, F.cross_entropy)
    for gene, score in scores.items():
        planted = useless[gene.rpartition(".")[2]]
        # a query, key or value of such a head still has weights but no gradient, an outgoing weight has no size: exactly zero
        assert sorted(np.flatnonzero(score == 0)) == planted, gene
    assert all(p.grad is None for p in case.model.parameters())
    reorder(case.net, scores)
    trimmed = {f"layers.{i}.{kind}": {"heads": 2, "width": 24}[kind] for i in range(3) for kind in ("heads", "width")}
    with torch.no_grad():
        torch.testing.assert_close(case.net(case.batch(), Subnet((0, 1, 2), trimmed)), before, rtol=0, atol=ATOL)


def test_importance_is_the_first_order_change_of_the_loss():
    """Against a difference of losses: every weight of the unit scaled by 1 - ε."""
    case = Case("toy")
    case.model.double()
    inputs, labels = {"features": case.batch()["features"].double()}, torch.tensor([0, 1, 2, 1])
    scores = importance(case.net, [(inputs, labels)], F.cross_entropy)
    step = 1e-6
    for gene, members, unit in (
        ("layers.1.width", (("blocks.1.up.weight", 0), ("blocks.1.up.bias", 0), ("blocks.1.down.weight", 1)), 5),
        ("layers.0.rank", (("blocks.0.down.weight", 0), ("blocks.0.out.weight", 1)), 2),
    ):
        losses = []
        for factor in (1 - step, 1 + step):
            state = {n: p.detach().clone() for n, p in case.model.named_parameters()}
            for name, axis in members:
                state[name].select(axis, unit).mul_(factor)
            losses.append(float(F.cross_entropy(torch.func.functional_call(case.model, state, (inputs["features"],)).logits, labels)))
        # central difference in float64: truncation 1e-12, rounding 1e-16 / 1e-6
        assert scores[gene][unit] == pytest.approx(abs(losses[1] - losses[0]) / (2 * step), rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("useless", [0, 1, 2])
def test_a_layer_that_does_nothing_is_the_first_to_go(useless):
    case = Case("vit")
    with torch.no_grad():
        block = case.model.vit.layers[useless]
        for linear in (block.attention.o_proj, block.mlp.fc2):
            linear.weight.zero_()
            linear.bias.zero_()
        batches = [(case.batch(seed), None) for seed in range(2)]
        batches = [(inputs, case.net(inputs, case.net.largest())) for inputs, _ in batches]
    order = layer_order(case.net, batches, F.mse_loss, 1)  # against its own outputs: without the useless layer the loss is zero
    assert sorted(order) == [0, 1, 2]
    assert order[-1] == useless
    kept = layer_order(case.net, batches, F.mse_loss, 2)
    assert kept == (*[i for i in range(3) if i != useless], useless)


def test_layers_are_removed_greedily():
    """Losses said by a table, not a network: which layer goes first, second, and a tie, which goes to the earlier layer."""
    case = Case("vit")
    costs = {(0, 1, 2): 0.0, (1, 2): 3.0, (0, 2): 1.0, (0, 1): 2.0, (2,): 4.0, (0,): 4.0, (1,): 0.0}

    class Net:
        largest, family = case.net.largest, case.family

        def eval(self): ...

        def __call__(self, inputs, subnet):
            return subnet.layers

    order = layer_order(Net(), [({}, None)], lambda layers, labels: costs[layers], 1)
    assert order == (2, 0, 1)  # 1 goes first (cost 1), then of 0 and 2, equal, the earlier; (1,), which is best alone, is never looked at


# ---------------------------------------------------------------------------------------------- emulated quantization


def integer_linear(x, weight, bias, low, high):
    """Static INT8 in NumPy integers: u8 inputs, s8 weights per row, exact int32 sums, one float multiplication."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32((high - low) / 255)
    zero = round(-low / float(scale))
    q = np.clip(np.array([round(float(v)) for v in (x.astype(np.float32) / scale).ravel()]).reshape(x.shape) + zero, 0, 255)
    rows = []
    for row in weight:
        row_scale = np.float32(max(abs(float(v)) for v in row) / 127)
        rows.append((np.array([max(-127, min(127, round(float(v) / float(row_scale)))) for v in row], np.int64), row_scale))
    sums = (q.astype(np.int64) - zero) @ np.stack([r for r, _ in rows]).T
    assert np.abs(sums).max() < 2**31
    return sums * (float(scale) * np.array([s for _, s in rows], np.float64)) + (0 if bias is None else bias)


def away_from_ties(rng, shape, scale):
    """Values up to 0.4 steps from the grid, some of them beyond it on both sides."""
    return ((rng.integers(-200, 200, shape) + rng.uniform(-0.4, 0.4, shape)) * scale).astype(np.float32)


@pytest.mark.parametrize(("low", "high"), [(-1.0, 2.0), (0.0, 3.0), (-0.5, 0.0), (-7.3, 0.01), (0.2, 1.0)])
def test_emulated_products_are_those_of_integers(low, high):
    rng = np.random.default_rng(0)
    scale = (max(high, 0) - min(low, 0)) / 255
    x = away_from_ties(rng, (3, 5, 16), scale)
    weight, bias = rng.standard_normal((8, 16)).astype(np.float32), rng.standard_normal(8).astype(np.float32)
    linear = FakeQuantizer({"w": "int8"}, ActivationRanges(method="minmax", sites=(("w", low, high),)))
    got = linear("w", torch.from_numpy(x), torch.from_numpy(weight), torch.from_numpy(bias)).numpy()
    want = integer_linear(x, weight, bias, low, high)
    # no tie, so every integer agrees; what is left is 16 float32 sums of terms up to 255 · scale · max |w|
    np.testing.assert_allclose(got, want, atol=16 * 2**-23 * 255 * scale * np.abs(weight).max() + 1e-6)


@pytest.mark.parametrize(("low", "high"), [(-1.0, 2.0), (0.0, 3.0), (-7.3, 0.01)])
def test_emulated_symmetric_products_are_those_of_signed_integers(low, high):
    rng = np.random.default_rng(0)
    scale = max(-low, high) / 127
    x = away_from_ties(rng, (3, 5, 16), scale)  # beyond both ends: -128 is used, +128 is not
    weight = rng.standard_normal((8, 16)).astype(np.float32)
    linear = FakeQuantizer({"w": "int8-symmetric"}, ActivationRanges(method="minmax", sites=(("w", low, high),)))
    got = linear("w", torch.from_numpy(x), torch.from_numpy(weight), None).numpy()
    steps = np.abs(weight).max(axis=1) / 127
    want = (np.clip(np.rint(x / scale), -128, 127) @ np.rint(weight / steps[:, None]).T) * scale * steps
    np.testing.assert_allclose(got, want, atol=16 * 2**-23 * 128 * scale * np.abs(weight).max() + 1e-6)  # 16 float32 sums, as above


def test_ties_go_to_the_even_integer():
    scale = 2.0**-7  # exact in float32, so halves are exact too
    x = (np.array([[-1.5, -0.5, 0.5, 1.5, 2.5, 3.5]]) * scale).astype(np.float32)
    linear = FakeQuantizer({"w": "int8"}, ActivationRanges(method="minmax", sites=(("w", -128 * scale, 127 * scale),)))
    got = linear("w", torch.from_numpy(x), torch.eye(6), None).numpy()
    np.testing.assert_allclose(got, np.array([[-2, 0, 0, 2, 2, 4]]) * scale, rtol=1e-6)  # of an identity with scale 1/127: 127/127


def test_what_is_not_quantized_is_untouched_and_tables_lose_at_most_half_a_step():
    rng = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 6, generator=rng), torch.randn(4, 6, generator=rng)
    linear = FakeQuantizer({"w": "int8", "table": "weight-int8"}, ActivationRanges(method="minmax", sites=(("w", -1, 1),)))
    assert torch.equal(linear("other", x, weight, None), x @ weight.T)
    ids = torch.tensor([[3, 0], [1, 1]])
    rows = linear("table", ids, weight, None)
    step = weight.abs().amax(dim=1) / 127
    assert not torch.equal(rows, weight[ids])
    assert ((rows - weight[ids]).abs() <= 0.5001 * step[ids][..., None]).all()


def test_query_key_and_value_share_an_input_but_not_a_range_that_differs():
    """The quantized input is remembered for the next product only if it is the same tensor."""
    scale = {"a": 1.0, "b": 1.0}
    linear = FakeQuantizer(dict.fromkeys(scale, "int8"), ActivationRanges(method="minmax", sites=(("a", -1, 1), ("b", -1, 1))))
    x, y, weight = torch.full((1, 2), 0.5), torch.full((1, 2), 0.25), torch.eye(2)
    outputs = [linear(name, value, weight, None)[0, 0].item() for name, value in (("a", x), ("b", x), ("a", y), ("b", x.clone()))]
    np.testing.assert_allclose(outputs, [0.5, 0.5, 0.25, 0.5], atol=1 / 255)  # half a step of 2/255


def observed(values, method, scheme="int8"):
    observer = Observer({"w": scheme})
    for part in values:
        observer("w", torch.from_numpy(part), torch.eye(part.shape[-1]), None)
        observer("other", torch.full((1, part.shape[-1]), 99.0), torch.eye(part.shape[-1]), None)
    ((name, low, high),) = observer.ranges(method).sites
    assert name == "w"
    return low, high


def heavy_tailed(seed=0):
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((4, 16, 64)).astype(np.float32)  # 4 batches of 1,024: all are kept
    values[2, 3, 7], values[1, 0, 0] = 60.0, -25.0
    return values


def test_minmax_is_exact_over_all_batches_and_holds_zero():
    values = heavy_tailed()
    assert observed(values, "minmax") == (-25.0, 60.0)
    assert observed(np.abs(values), "minmax") == (0.0, 60.0)
    assert observed(-np.abs(values), "minmax") == (-60.0, 0.0)


def test_percentile_leaves_one_in_ten_thousand_out_on_each_side():
    values = heavy_tailed()
    ordered = np.sort(values.ravel().astype(np.float64))
    place = 1e-4 * (len(ordered) - 1)  # between two values, by linear interpolation
    below, share = int(place), place - int(place)
    low = ordered[below] + share * (ordered[below + 1] - ordered[below])
    high = ordered[-1 - below] + share * (ordered[-2 - below] - ordered[-1 - below])
    np.testing.assert_allclose(observed(values, "percentile"), (low, high), rtol=1e-5)
    assert observed(np.abs(values), "percentile")[0] == 0.0


def signed_error(values, end):
    grid = np.arange(-128, 128) * end / 127
    return float(np.square(np.abs(values.ravel()[:, None] - grid[None]).min(axis=1)).mean())


def test_mse_clips_where_the_squared_error_is_least():
    values = heavy_tailed()

    def error(low, high):
        step = (high - low) / 255
        grid = np.arange(256) * step - round(-low / step) * step
        return float(np.square(np.abs(values.ravel()[:, None] - grid[None]).min(axis=1)).mean())

    low, high = observed(values, "mse")
    best = min((share * 60 for share in np.linspace(0.3, 1, 29)), key=lambda end: signed_error(values, end))
    assert observed(values, "mse", "int8-symmetric")[1] == pytest.approx(best) != pytest.approx(high)  # on the grid it will have
    assert low / -25 == pytest.approx(high / 60)  # both ends clipped by one share
    # 1 %: the tool rounds the zero point of a float32 scale, the grid above has it exact
    assert error(low, high) <= 1.01 * min(error(-25 * s, 60 * s) for s in np.linspace(0.3, 1, 29))
    clean = np.random.default_rng(1).uniform(-1, 1, (2, 16, 64)).astype(np.float32)
    assert observed(clean, "mse")[1] > 0.97 * clean.max()  # without outliers nothing is worth clipping


def test_divergence_is_that_of_its_definition():
    rng = np.random.default_rng(0)
    counts = rng.poisson(3.0, 64) * (rng.random(64) < 0.8)
    for first, last, levels in ((0, 64, 16), (5, 60, 16), (16, 48, 8), (20, 52, 5)):
        p = [float(counts[i]) for i in range(first, last)]
        inside = list(p)
        p[0], p[-1] = p[0] + counts[:first].sum(), p[-1] + counts[last:].sum()
        q = [0.0] * len(p)
        for level in range(levels):
            bins = range(level * len(p) // levels, (level + 1) * len(p) // levels)
            filled = [i for i in bins if p[i] > 0]
            for i in filled:
                q[i] = sum(inside[j] for j in bins) / len(filled)
        pairs = [(a / sum(p), max(b / sum(q), 1e-9)) for a, b in zip(p, q, strict=True) if a > 0]
        assert divergence(counts, first, last, levels) == pytest.approx(sum(a * np.log(a / b) for a, b in pairs))


def test_entropy_clips_rare_outliers_and_nothing_else():
    values = heavy_tailed()
    low, high = observed(values, "entropy")
    assert 0.29 < high / 60 < 0.5
    assert low / -25 == pytest.approx(high / 60)
    clean = np.random.default_rng(1).uniform(-1, 1, (2, 16, 64)).astype(np.float32)
    assert observed(clean, "entropy")[1] > 0.97 * clean.max()
    assert observed(np.zeros((1, 4, 4), np.float32), "entropy") == (0.0, 0.0)


@pytest.mark.parametrize("name", ["vit", "bert", "toy"])
def test_calibration_sees_what_each_product_reads(name):
    """Ranges from forward hooks on the extracted module's own linears."""
    case = Case(name)
    genome = spaces.genome(case.space, spaces.uniform(case.space)) | {"depth": 2}
    point = spaces.candidate(case.space, genome)
    batches = [(case.batch(seed, batch=1), torch.zeros(1)) for seed in range(3)]
    ranges = calibrate(case.net, case.space, point, case.target.id, batches, "minmax")
    small = extract(case.model, case.family, case.config, case.space, point)
    seen: dict[str, list[float]] = {}
    kept = spaces.kept_layers(case.space, point)

    def hook(path):
        def remember(module, inputs):
            bounds = seen.setdefault(path, [0.0, 0.0])
            bounds[0], bounds[1] = min(bounds[0], inputs[0].min().item()), max(bounds[1], inputs[0].max().item())

        return remember

    for path, module in small.named_modules():
        digits = [part for part in path.split(".") if part.isdigit()]
        if isinstance(module, torch.nn.Linear) and digits:
            module.register_forward_pre_hook(hook(path.replace(f".{digits[0]}.", f".{kept[int(digits[0])]}.", 1) + ".weight"))
    with torch.no_grad():
        for inputs, _ in batches:
            small(**inputs)
    assert [site for site, _, _ in ranges.sites] == sorted(seen)
    for site, low, high in ranges.sites:
        np.testing.assert_allclose((low, high), seen[site], atol=ATOL)


def test_emulation_quantizes_what_the_candidate_says_and_no_more():
    """A toy candidate with one quantized block, against the same network written in NumPy."""
    case = Case("toy")
    genome = spaces.genome(case.space, spaces.largest(case.space)) | {"layers.1.mlp.precision": "int8"}
    point = spaces.candidate(case.space, genome)
    batches = [(case.batch(seed), torch.tensor([0, 1, 2, 0])) for seed in range(2)]
    ranges = calibrate(case.net, case.space, point, case.target.id, batches, "minmax")
    assert [site for site, _, _ in ranges.sites] == [f"blocks.1.{part}.weight" for part in ("down", "out", "up")]
    logits, labels = emulate(case.net, case.space, point, case.target.id, batches, ranges)
    assert labels.tolist() == [0, 1, 2, 0] * 2
    p = {name: value.detach().numpy().astype(np.float64) for name, value in case.model.named_parameters()}
    bounds = {site: (low, high) for site, low, high in ranges.sites}

    def norm(x, at):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p[f"{at}.weight"] + p[f"{at}.bias"]

    def product(x, at):
        weight, bias = p[f"{at}.weight"], p.get(f"{at}.bias")
        if f"{at}.weight" in bounds:
            return integer_linear(x, weight.astype(np.float32), bias, *bounds[f"{at}.weight"])
        return x @ weight.T + (0 if bias is None else bias)

    x = product(np.concatenate([inputs["features"].numpy() for inputs, _ in batches]), "embed")
    for i in range(3):
        y = np.maximum(product(norm(x, f"blocks.{i}.norm"), f"blocks.{i}.up"), 0)
        x = x + product(product(y, f"blocks.{i}.down"), f"blocks.{i}.out")
    want = product(norm(x, "norm"), "classifier")
    # an input that lies within float32 noise of a tie may round the other way: one step, of which few of 8 x 16 values are
    steps = np.abs(logits - want)
    assert np.median(steps) < 1e-5
    assert steps.max() < 0.05
    plain = case.model(torch.cat([inputs["features"] for inputs, _ in batches])).logits.detach().numpy()
    assert np.abs(logits - plain).max() > 1e-3  # and the quantized block shows

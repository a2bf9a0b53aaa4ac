"""The family for microcontrollers: its space, its slices against linear algebra, extraction, programs in NumPy, sizes."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
import torch

from nascompile import models, network, plugins, programs, space as spaces
from nascompile.errors import ModelError, UnsupportedError
from nascompile.families import mcu_vit
from nascompile.families.mcu_vit import McuVitConfig
from nascompile.mcu import calibrated, interpreter, transformer
from nascompile.preprocess import Preprocessing, Preprocessor
from nascompile.records import FLOAT32, Target
from nascompile.supernet import Supernet, extract

torch.set_num_threads(1)

FAMILY = mcu_vit.PLUGIN
MEAN, DEVIATION = (0.3, 0.5, 0.4), (0.25, 0.25, 0.25)
SIZES = {
    "image_size": 16, "image_sizes": (8, 16), "patch_sizes": (4, 8), "hidden_size": 32, "hidden_sizes": (16, 24, 32),
    "num_hidden_layers": 3, "depths": (2, 3), "num_attention_heads": 3, "head_dim": 8,
    "intermediate_size": 48, "widths": (20, 48), "ranks": (4, 8, 32),
    "num_labels": 5,
}  # fmt: skip


class Backend:
    name, width_multiple, accepts = "made-up", 4, "program"

    def supports(self, precision) -> str:
        return "" if precision.name == "int8" else "only int8"


class Case:
    """A small network whose numbers are all different, its space, images."""

    def __init__(self, **changes) -> None:
        torch.manual_seed(2)
        self.config = McuVitConfig(**SIZES | changes)
        self.model = FAMILY.create(self.config)
        with torch.no_grad():
            for parameter in self.model.parameters():  # zeros and ones would hide mistakes
                parameter.add_(0.1 * torch.randn_like(parameter))
        self.net = Supernet(FAMILY, self.model)
        self.target = Target(device="d", backend="made-up", workload=FAMILY.workload(self.config, 1, 0))
        self.space = network.search_space(FAMILY, self.config, Backend(), self.target, "m", (2, 0, 1), ("int8",))
        self.weights = {name: p.detach().numpy() for name, p in self.model.named_parameters()}
        pixels = np.random.default_rng(1).integers(0, 256, (24, 3, 16, 16)) / 255
        self.images = ((pixels - np.reshape(MEAN, (3, 1, 1))) / np.reshape(DEVIATION, (3, 1, 1))).astype(np.float32)

    def point(self, **genes):
        """The largest network, all INT8, but for some genes; `rank`, `heads` and `width` are of all layers."""
        genome = spaces.genome(self.space, spaces.uniform(self.space))
        for gene, value in genes.items():
            genome |= {slot: value for slot in genome if slot == gene or slot.endswith(f".{gene}")}
        return spaces.candidate(self.space, genome)

    def points(self, count: int, seed: int = 5):
        rng = np.random.default_rng(seed)
        return [spaces.quantized(self.space, spaces.sample(self.space, rng)) for _ in range(count)]

    def logits(self, point) -> np.ndarray:
        with torch.no_grad():
            return self.net({"pixel_values": torch.from_numpy(self.images)}, self.net.subnet(self.space, point)).numpy()

    def network(self, point) -> calibrated.Network:
        return programs.network_of(FAMILY, self.config, self.space, point, self.target, self.weights, MEAN, DEVIATION)


@pytest.fixture(scope="module")
def case():
    return Case()


# ---------------------------------------------------------------------------------------------- configurations and spaces


@pytest.mark.parametrize(
    ("side", "images", "patches"), [(16, (16,), (4,)), (32, (32,), (8, 4)), (64, (32, 64), (16, 8, 4)), (96, (48, 96), (16, 8))]
)
def test_images_and_patches_follow_from_the_side(side, images, patches):
    config = McuVitConfig(image_size=side)
    assert (config.images, config.patches) == (images, patches)
    assert FAMILY.unsupported(config) == ""
    assert all(mcu_vit.tokens(i, p) <= 512 for i, p in itertools.product(images, patches))


def test_the_space_is_that_of_mcuformer():
    config = McuVitConfig(image_size=64)
    choices = FAMILY.choices(config, 4)
    assert choices["depth"] == (3, 4, 5, 6, 7, 8)
    assert choices["hidden"] == (64, 96, 128)
    assert choices["layers.7.heads"] == (1, 2, 3, 4)
    assert choices["layers.7.width"] == (64, 128, 256, 384)
    assert choices["layers.7.rank"] == (32, 64, 128)
    largest = sum(np.prod(shape) for name, shape in FAMILY.parameters(config).items() if name.startswith("layers."))
    assert largest > 2e6  # two factors of every map: about twice the bytes of whole ones in INT8, which flash cannot hold


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"image_sizes": (16, 24), "image_size": 24}, "image sizes 16, 24 do not divide"),
        ({"patch_sizes": (5,)}, "not a whole number of patches of 5"),
        ({"image_size": 96, "image_sizes": (96,), "patch_sizes": (4,)}, "577 tokens of image 96 and patch 4 are more than 512"),
        ({"hidden_sizes": (16, 24)}, "choices of hidden 16, 24 do not end with the largest network's 32"),
        ({"ranks": (8, 64)}, "choices of rank 8, 64 do not end with the largest network's 32"),
        ({"layer_ranks": (0, 0, 0)}, "one extracted network"),
        ({"image_size": 10, "image_sizes": (), "patch_sizes": ()}, "no patch size cuts images of 10"),
    ],
)
def test_configurations_without_programs_are_refused(changes, says):
    assert says in FAMILY.unsupported(McuVitConfig(**SIZES | changes))


def test_a_network_is_made_for_the_images():
    sizes = {(28, 28, 1): 32, (32, 20, 3): 32, (48, 64, 3): 64, (200, 300, 3): 64, (9, 9, 1): 16}
    for shape, side in sizes.items():
        config = mcu_vit.made_for(*shape)
        assert (config.image_size, config.num_channels) == (side, shape[2])


def test_it_is_for_microcontrollers_only(case):
    with pytest.raises(UnsupportedError, match="`openvino` builds no networks of the family mcu_vit: they are for mcu_c"):
        models.check_lowering(FAMILY, Target(device="cpu", backend="openvino", workload=case.target.workload))
    models.check_lowering(FAMILY, Target(device="stm32f746", backend="mcu_c", workload=case.target.workload))
    models.check_lowering(plugins.get("families", "vit"), Target(device="cpu", backend="openvino", workload=case.target.workload))


def test_operators_of_the_whole_default_space_are_few_and_found_fast():
    config = McuVitConfig(image_size=64)
    target = Target(device="d", backend="made-up", workload=FAMILY.workload(config, 1, 0))
    space = network.search_space(FAMILY, config, Backend(), target, "m", precisions=("int8",))
    began = time.perf_counter()
    found = network.operators(FAMILY, config, space, target)
    assert time.perf_counter() - began < 20
    assert len(found) == len(set(found)) < 650
    assert {o.dim("sequence") for o in found if o.kind == "attention"} == {257, 65, 17, 5}


# ---------------------------------------------------------------------------------------------- slices


def test_whole_maps_are_products_of_factors_and_others_prefixes(case):
    """Of one map, by hand."""
    first, second = (case.weights[f"layers.1.mlp.up.{factor}.weight"].astype(np.float64) for factor in ("first", "second"))
    whole = case.network(case.point()).parameters
    np.testing.assert_allclose(whole["layers.1.up.weight"], second @ first, atol=1e-12)
    low = case.network(case.point(rank=8, hidden=24, width=20)).parameters
    np.testing.assert_allclose(low["layers.1.up.first"], first[:8, :24], atol=1e-12)
    np.testing.assert_allclose(low["layers.1.up.second"], second[:20, :8], atol=1e-12)
    first, second = (case.weights[f"layers.1.attention.query.{factor}.weight"].astype(np.float64) for factor in ("first", "second"))
    small = case.network(case.point(rank=8, hidden=16, heads=2)).parameters  # 8 · (16 + 16) is no less than 16 · 16
    np.testing.assert_allclose(small["layers.1.query.weight"], second[:16, :8] @ first[:8, :16], atol=1e-12)


def test_the_elastic_forward_is_the_network_in_numpy(case):
    kinds = set()
    for point in [*case.points(12), spaces.uniform(case.space), spaces.quantized(case.space, spaces.smallest(case.space))]:
        net = case.network(point)
        kinds.add(any(name.endswith(".first") for name in net.parameters))
        np.testing.assert_allclose(case.logits(point), calibrated.forward(net, case.images), atol=2e-4)
        graph = network.graph(FAMILY, case.config, case.space, point, case.target)
        described = FAMILY.described(case.config, case.weights, spaces.kept_layers(case.space, point), dict(point.architecture))
        assert transformer.Shape.of_graph(graph, case.target.workload.resolution) == described.shape == net.shape
    assert kinds == {False, True}


def test_a_smaller_image_is_the_mean_of_pixels(case):
    point = case.point(image=8, patch=4)
    assert case.network(point).pool == 2
    small = case.images.reshape(24, 3, 8, 2, 8, 2).mean((3, 5))
    again = np.repeat(np.repeat(small, 2, 2), 2, 3)
    other = Case()
    other.images = again
    np.testing.assert_allclose(other.logits(point), case.logits(point), atol=1e-5)
    assert not np.allclose(other.logits(case.point()), case.logits(case.point()), atol=1e-2)


def test_extraction_is_the_elastic_network(case, tmp_path):
    inputs = torch.from_numpy(case.images)
    for number, point in enumerate([*case.points(20), spaces.uniform(case.space)]):
        small = extract(case.model, FAMILY, case.config, case.space, point)
        with torch.no_grad():
            np.testing.assert_allclose(small(pixel_values=inputs).logits.numpy(), case.logits(point), atol=1e-5)
        graph = network.graph(FAMILY, case.config, case.space, point, case.target)
        assert sum(node.parameters for node in graph.nodes) == sum(p.numel() for p in small.parameters())
        if number < 3:
            small.save_pretrained(tmp_path / str(number))
            again = FAMILY.load(str(tmp_path / str(number)))
            with torch.no_grad():
                np.testing.assert_allclose(again(pixel_values=inputs).logits.numpy(), case.logits(point), atol=1e-5)
    assert case.model.config.num_hidden_layers == 3, "the super-network is as it was"
    assert FAMILY.unsupported(small.config)


def test_settled_factors_are_those_of_the_singular_values(case):
    own = Case()
    before = own.logits(own.point())
    FAMILY.settle(own.model)
    np.testing.assert_allclose(own.logits(own.point()), before, atol=1e-4)
    for path in ("layers.0.attention.query", "layers.2.mlp.down"):
        module = own.model.get_submodule(path)
        first, second = (getattr(module, factor).weight.detach().double().numpy() for factor in ("first", "second"))
        whole = second @ first
        values = np.linalg.svd(whole, compute_uv=False)
        for rank in (1, 4, 8):  # the error of the best approximation is what the other singular values hold (Eckart and Young)
            error = np.linalg.norm(whole - second[:, :rank] @ first[:rank])
            assert error == pytest.approx(np.sqrt((values[rank:] ** 2).sum()), rel=1e-3)
        norms = np.linalg.norm(first, axis=1), np.linalg.norm(second, axis=0)
        np.testing.assert_allclose(*norms, atol=1e-4)
    unsettled = case.model.get_submodule("layers.0.attention.query")
    whole = (unsettled.second.weight @ unsettled.first.weight).detach().numpy()
    error = np.linalg.norm(whole - (unsettled.second.weight[:, :8] @ unsettled.first.weight[:8]).detach().numpy())
    assert error > 1.05 * np.sqrt((np.linalg.svd(whole, compute_uv=False)[8:] ** 2).sum())


# ---------------------------------------------------------------------------------------------- operators and programs


def test_ranks_are_in_operators_only_where_some_map_is_two_factors(case):
    def dims(**genes):
        graph = network.graph(FAMILY, case.config, case.space, case.point(**genes), case.target)
        return {node.name: dict(node.operator.dims) for node in graph.nodes}

    assert not any("rank" in own for own in dims().values())
    low = dims(rank=8)
    assert (low["layers.0.attention"]["rank"], low["layers.0.mlp"]["rank"]) == (8, 8)
    mixed = dims(rank=8, hidden=16, heads=2)  # 8 · 32 factors are no fewer than 16 · 16 products
    assert "rank" not in mixed["layers.0.attention"]
    assert mixed["layers.0.mlp"]["rank"] == 8
    small = dims(image=8, patch=8)
    assert (small["embedding"]["image"], small["embedding"]["patch"], small["layers.0.attention"]["sequence"]) == (8, 8, 2)
    assert dims()["layers.2.mlp"]["sequence"] == dims()["head"]["sequence"] == 1


def test_multiplications_are_those_of_the_program(case):
    """Which does the first factor of keys and values again for every head."""
    for point in [*case.points(12), spaces.uniform(case.space)]:
        graph = network.graph(FAMILY, case.config, case.space, point, case.target)
        shape = transformer.Shape.of_graph(graph, (16, 16))
        program = transformer.build("candidate", shape, transformer.SizesOnly())
        repeated = sum(
            2 * (layer.heads - 1) * shape.tokens * rank * shape.width
            for layer in shape.layers
            if (rank := layer.factors(shape.width, layer.inner))
        )
        assert sum(FAMILY.macs(node.operator) for node in graph.nodes) + repeated == program.structure.macs


def signal_to_noise(program, images, want) -> float:
    """dB of the program's scores against float logits."""
    pixels, logits = program.structure.pixels, program.structure.logits
    found = np.stack([interpreter.run(program, image) for image in pixels.quantize(images)]) * logits.scale
    return 10 * np.log10((want**2).sum() / ((found - want) ** 2).sum())


@pytest.mark.parametrize(
    "genes", [{}, {"rank": 8}, {"rank": 4, "image": 8, "patch": 4, "hidden": 24}, {"patch": 8, "heads": 1, "depth": 2}]
)
@pytest.mark.parametrize("fusion", ["blocks", "all"])
def test_integers_are_near_the_network(case, genes, fusion):
    net = case.network(case.point(**genes))
    program = programs.lower(net, calibrated.observe(net, [case.images]), fusion)
    assert program.structure.image == (net.shape.image[0], net.shape.image[0], 3)
    assert signal_to_noise(program, case.images[:8], calibrated.forward(net, case.images[:8])) > 20


def test_what_the_weights_lack_is_named(case):
    weights = {name: value for name, value in case.weights.items() if name != "classifier.bias"}
    with pytest.raises(ModelError, match=r"no such parameter: classifier\.bias"):
        programs.network_of(FAMILY, case.config, case.space, case.point(), case.target, weights, MEAN, DEVIATION)


def test_blocks_depend_on_the_genes_that_decide_what_they_execute(case):
    graph = network.graph(FAMILY, case.config, case.space, case.point(), case.target)
    genes = {node.name: set(node.genes) for node in graph.nodes}
    assert genes["embedding"] == {"hidden", "image", "patch"}
    assert {"hidden", "image", "patch", "layers.0.heads", "layers.0.rank"} <= genes["layers.0.attention"]
    assert genes["head"] == {"hidden"}
    small = network.graph(FAMILY, case.config, case.space, case.point(image=8, patch=8), case.target)
    kernel = 8 * 8 * 3 * 32 + 32 + 2 * 32 + 32  # one pair's projection and positions, and the class token
    assert small.nodes[0].parameters == kernel
    assert small.nodes[0].size_bytes == 4 * kernel


def test_pixels_take_the_network_on_their_way(case):
    """As a preprocessor makes them of bytes, and a program makes bytes of them again."""
    settings = Preprocessing(modality="image", inputs=("pixel_values",), channels=3, mean=MEAN, std=DEVIATION)
    data = np.random.default_rng(3).integers(0, 256, (4, 3, 16, 16)).astype(np.uint8)
    images = Preprocessor(settings, {}).finish({"pixel_values": data})["pixel_values"]
    net = case.network(case.point())
    assert (net.pixels().quantize(images).transpose(0, 3, 1, 2) == data.astype(int) - 128).all()


def test_an_operator_has_the_precision_it_is_given(case):
    values = network.values(FAMILY, case.config, case.space, case.point())
    for segment in FAMILY.segments(case.config):
        assert FAMILY.operator(case.config, segment, values, case.target.workload, FLOAT32).precision == FLOAT32

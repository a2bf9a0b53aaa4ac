"""Vision transformers for microcontrollers: MCUFormer's space (Liang et al., NeurIPS 2023), trained from random weights.

Elastic are the image and its patches, which decide how many tokens there are, the channels of the residual stream, and in each layer
heads, neurons and the rank of its maps. Every map of a layer is stored as two factors of full rank, of which `rank` keeps a prefix; where
two factors would be no smaller than their product, as at the largest rank, the map is that product: one whole matrix.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel

from nascompile.families import Group, InputSpec, Linear, Segment
from nascompile.families.encoder import load_pretrained, parameter_shapes
from nascompile.mcu import torch_forward
from nascompile.mcu.program import MOST_TOKENS
from nascompile.mcu.transformer import Layer, Shape
from nascompile.records import Operator, Precision, Workload

PARTS = {
    "norm1": "attention.norm", "query": "attention.query", "key": "attention.key", "value": "attention.value", "out": "attention.out",
    "norm2": "mlp.norm", "up": "mlp.up", "down": "mlp.down",
}  # fmt: skip
"""Part of a program's layer ▸ module of the network's."""
MAPS = {"attention": ("query", "key", "value", "out"), "mlp": ("up", "down")}
SIDES = (16, 32, 64)
"""Largest images of networks that are made for data: the first that is no smaller than the data's, or the last."""
PATCHES = (32, 16, 8, 4)
FEWEST_PATCHES = 16
"""That the largest image is cut into, unless the configuration says otherwise."""


class McuVitConfig(PretrainedConfig):  # type: ignore[misc]
    """Sizes of the largest network, and the choices of its genes; empty choices are those of `choices`.

    `layer_heads`, `layer_widths` and `layer_ranks` (0: whole) are of a network that was extracted, and none of it is elastic.
    """

    model_type = "mcu_vit"

    def __init__(
        self, image_size: int = 32, num_channels: int = 3, hidden_size: int = 128, num_hidden_layers: int = 8,
        num_attention_heads: int = 4, head_dim: int = 32, intermediate_size: int = 384, layer_norm_eps: float = 1e-5,
        depths: tuple[int, ...] = (), hidden_sizes: tuple[int, ...] = (), image_sizes: tuple[int, ...] = (),
        patch_sizes: tuple[int, ...] = (), heads: tuple[int, ...] = (), widths: tuple[int, ...] = (), ranks: tuple[int, ...] = (),
        layer_heads: tuple[int, ...] = (), layer_widths: tuple[int, ...] = (), layer_ranks: tuple[int, ...] = (), **rest: Any,
    ) -> None:  # fmt: skip
        super().__init__(**rest)
        self.image_size, self.num_channels = image_size, num_channels
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        self.num_attention_heads, self.head_dim, self.intermediate_size = num_attention_heads, head_dim, intermediate_size
        self.layer_norm_eps = layer_norm_eps
        self.depths, self.hidden_sizes, self.heads, self.widths, self.ranks = map(list, (depths, hidden_sizes, heads, widths, ranks))
        self.image_sizes, self.patch_sizes = list(image_sizes), list(patch_sizes)
        self.layer_heads, self.layer_widths, self.layer_ranks = map(list, (layer_heads, layer_widths, layer_ranks))

    @property
    def images(self) -> tuple[int, ...]:
        """Sides of images, ascending: half of a large one too."""
        side = self.image_size
        return tuple(sorted(self.image_sizes)) or ((side // 2, side) if side >= 64 else (side,))

    @property
    def patches(self) -> tuple[int, ...]:
        """Sides of patches, descending: the smallest make the largest network."""
        if self.patch_sizes:
            return tuple(sorted(self.patch_sizes, reverse=True))
        fitting = [p for p in PATCHES if not any(image % p for image in self.images) and tokens(self.image_size, p) <= MOST_TOKENS]
        return tuple(p for p in fitting if tokens(self.image_size, p) > FEWEST_PATCHES)


def tokens(image: int, patch: int) -> int:
    """Patches and the class token."""
    return (image // patch) ** 2 + 1


def made_for(height: int, width: int, channels: int) -> McuVitConfig:
    """A configuration for images of such a size, which are scaled to one of `SIDES`."""
    side = next((side for side in SIDES if side >= max(height, width)), SIDES[-1])
    return McuVitConfig(image_size=side, num_channels=channels)


# ---------------------------------------------------------------------------------------------- modules


class Factors(nn.Module):
    """A linear map in two factors."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, rank, bias=False)
        self.second = nn.Linear(rank, outputs)

    @torch.no_grad()
    def divide(self, weight: torch.Tensor) -> None:
        """Take on a weight (outputs, inputs): prefixes of the factors are its best approximations, singular values are shared alike."""
        u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
        count, root = min(len(s), self.first.out_features), s.sqrt()
        self.first.weight.zero_()[:count] = (root[:, None] * v)[:count]
        self.second.weight.zero_()[:, :count] = (u * root)[:, :count]

    @torch.no_grad()
    def whole(self) -> nn.Linear:
        """One matrix of the same function."""
        found = nn.Linear(self.first.in_features, self.second.out_features, device=self.first.weight.device)
        found.weight.copy_(self.second.weight @ self.first.weight)
        found.bias.copy_(self.second.bias)
        return found


class Embedding(nn.Module):
    """Of images of one size in patches of one size."""

    def __init__(self, config: McuVitConfig, image: int, patch: int) -> None:
        super().__init__()
        self.projection = nn.Linear(patch * patch * config.num_channels, config.hidden_size)  # of rows of columns of channels
        self.position = nn.Parameter(torch.zeros(tokens(image, patch), config.hidden_size))


class Embeddings(nn.Module):
    def __init__(self, config: McuVitConfig) -> None:
        super().__init__()
        self.class_token = nn.Parameter(torch.zeros(config.hidden_size))
        pairs = {pair_name(image, patch): Embedding(config, image, patch) for image in config.images for patch in config.patches}
        self.pairs = nn.ModuleDict(pairs)


class Attention(nn.Module):
    def __init__(self, config: McuVitConfig, inner: int, rank: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        for part in ("query", "key", "value"):
            setattr(self, part, _map(config.hidden_size, inner, rank))
        self.out = _map(inner, config.hidden_size, rank)


class Mlp(nn.Module):
    def __init__(self, config: McuVitConfig, width: int, rank: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.up = _map(config.hidden_size, width, rank)
        self.down = _map(width, config.hidden_size, rank)


class Block(nn.Module):
    def __init__(self, config: McuVitConfig, number: int) -> None:
        super().__init__()
        layer = _layer(config, *_sizes(config, number))
        inner, hidden = layer.inner, config.hidden_size
        extracted = bool(config.layer_ranks)
        self.attention = Attention(config, inner, layer.factors(hidden, inner) if extracted else hidden)
        self.mlp = Mlp(config, layer.hidden, layer.factors(hidden, layer.hidden) if extracted else hidden)


class McuVitForImageClassification(PreTrainedModel):  # type: ignore[misc]
    config_class = McuVitConfig
    base_model_prefix = "mcu_vit"
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: McuVitConfig) -> None:
        super().__init__(config)
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Block(config, number) for number in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor) -> Any:
        """Logits (batch, labels) as the `logits` of a Hugging Face output."""
        from transformers.modeling_outputs import ImageClassifierOutput

        layers = tuple(range(self.config.num_hidden_layers))
        values = {
            f"layers.{i}.{gene}": value
            for i in layers
            for gene, value in zip(("heads", "width", "rank"), _sizes(self.config, i), strict=True)
        }
        return ImageClassifierOutput(logits=run(self, pixel_values, layers, values))

    @torch.no_grad()
    def initialize(self) -> None:
        """Random weights: uniform ones of Glorot and Bengio for maps, small ones for positions."""
        for module in self.modules():
            if isinstance(module, Factors):
                module.divide(nn.init.xavier_uniform_(torch.empty(module.second.out_features, module.first.in_features)))
                module.second.bias.zero_()
            elif isinstance(module, Embedding):
                nn.init.normal_(module.projection.weight, std=module.projection.in_features**-0.5)
                nn.init.normal_(module.position, std=0.02)
        nn.init.normal_(self.embeddings.class_token, std=0.02)


def pair_name(image: int, patch: int) -> str:
    """Module of an image's and a patch's own kernel and positions."""
    return f"{image}_{patch}"


def _map(inputs: int, outputs: int, rank: int) -> nn.Module:
    return Factors(inputs, outputs, rank) if rank else nn.Linear(inputs, outputs)


def _sizes(config: McuVitConfig, number: int) -> tuple[int, int, int]:
    """Heads, width and rank of a layer of the largest network, or of one that was extracted."""
    if config.layer_ranks:
        rank = config.layer_ranks[number] or config.hidden_size
        return config.layer_heads[number], config.layer_widths[number], rank
    return config.num_attention_heads, config.intermediate_size, config.hidden_size


def _layer(config: McuVitConfig, heads: int, width: int, rank: int) -> Layer:
    return Layer(heads=heads, head_width=config.head_dim, hidden=width, rank=rank if rank < config.hidden_size else 0)


def _kept(config: McuVitConfig, values: Mapping[str, int], number: int | None) -> Layer:
    """What a sub-network keeps of a layer."""
    return _layer(config, *(values[f"layers.{number}.{gene}"] for gene in ("heads", "width", "rank")))


# ---------------------------------------------------------------------------------------------- one network of many


@dataclass(frozen=True)
class Described:
    """A sub-network in the terms of programs."""

    shape: Shape
    parameters: dict[str, Any]
    """By the names of `calibrated.Network`, sliced; a whole map's weight is the product of its factors."""
    names: dict[str, str]
    """Product of a program ▸ the weight parameter it multiplies by: of a whole map its second factor."""


def described(config: McuVitConfig, weights: Mapping[str, Any], layers: tuple[int, ...], values: Mapping[str, int]) -> Described:
    """Of arrays or tensors by their state-dict names. Without an image and a patch it has the largest, and the smallest."""
    hidden, image, patch = values.get("hidden", config.hidden_size), *_image_and_patch(config, values)
    parameters: dict[str, Any] = {}
    names: dict[str, str] = {}

    def put(name: str, module: str, outputs: int | None = None, inputs: int | None = None, rank: int = 0) -> None:
        if f"{module}.weight" in weights:
            weight = weights[f"{module}.weight"]
            parameters[f"{name}.bias"] = weights[f"{module}.bias"][:outputs]
            if weight.ndim > 1:
                parameters[f"{name}.weight"], names[name] = weight[:outputs, :inputs], f"{module}.weight"
            else:  # a norm
                parameters[f"{name}.weight"] = weight[:outputs]
            return
        kept = values[f"layers.{module.split('.')[1]}.rank"]
        first, second = weights[f"{module}.first.weight"][:kept, :inputs], weights[f"{module}.second.weight"][:outputs, :kept]
        parameters[f"{name}.bias"] = weights[f"{module}.second.bias"][:outputs]
        if rank:
            parameters.update({f"{name}.first": first, f"{name}.second": second})
            names.update({f"{name}.{factor}": f"{module}.{factor}.weight" for factor in ("first", "second")})
        else:
            parameters[f"{name}.weight"] = second @ first
            names[name] = f"{module}.second.weight"

    pair = f"embeddings.pairs.{pair_name(image, patch)}"
    put("embedding", f"{pair}.projection", hidden)
    parameters["position"] = weights[f"{pair}.position"][:, :hidden]
    parameters["class_token"] = weights["embeddings.class_token"][:hidden]
    shapes = []
    for number, i in enumerate(layers):
        layer = _kept(config, values, i)
        sizes = {"query": (layer.inner, hidden), "out": (hidden, layer.inner), "up": (layer.hidden, hidden), "down": (hidden, layer.hidden)}
        for part, module in PARTS.items():
            if part.startswith("norm"):
                put(f"layers.{number}.{part}", f"layers.{i}.{module}", hidden)
            else:
                outputs, inputs = sizes.get(part, sizes["query"])
                put(f"layers.{number}.{part}", f"layers.{i}.{module}", outputs, inputs, layer.factors(inputs, outputs))
        shapes.append(layer)
    put("norm", "norm", hidden)
    put("head", "classifier", None, hidden)
    shape = Shape(
        image=(image, image, config.num_channels), patch=patch, width=hidden, layers=tuple(shapes), classes=config.num_labels
    )
    return Described(shape, parameters, names)


def run(
    model: McuVitForImageClassification, images: torch.Tensor, layers: tuple[int, ...], values: Mapping[str, int],
    linear: Linear = torch_forward.plain,
) -> torch.Tensor:  # fmt: skip
    """Logits (batch, labels). A `linear` with a method `see` gets every product and every tensor, else products within layers; one with
    a method `rows` the positions of patches, which a program adds as bytes of their own."""
    found = described(model.config, dict(model.named_parameters()), layers, values)
    see = getattr(linear, "see", None)

    def product(name: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if see is None and not name.startswith("layers."):
            return F.linear(x, weight, bias)
        result: torch.Tensor = linear(found.names[name], x, weight, bias)
        return result

    if rows := getattr(linear, "rows", None):
        first, others = found.parameters["position"].split((1, found.shape.patches))
        found.parameters["position"] = torch.cat([first, rows(others)])
    epsilon = model.config.layer_norm_eps
    return torch_forward.forward(found.shape, found.parameters, images, epsilon, product=product, see=see or torch_forward.same)


def _image_and_patch(config: McuVitConfig, values: Mapping[str, int]) -> tuple[int, int]:
    return values.get("image", config.images[-1]), values.get("patch", config.patches[-1])


# ---------------------------------------------------------------------------------------------- the family


class McuVit:
    name = "mcu_vit"
    described = staticmethod(described)
    model_types: tuple[str, ...] = (McuVitConfig.model_type,)
    config_class = McuVitConfig
    reads_first_token = True
    accepts = ("program",)
    """What its networks can be lowered to."""
    unsliced = ("image", "patch")
    """Genes that slice nothing: they choose among parameters."""

    def unsupported(self, config: Any) -> str:
        """Needs choices that the kernels have, the largest network among them."""
        if config.layer_ranks:
            return "it is one extracted network, of which nothing is elastic"
        if not config.patches:
            return f"no patch size cuts images of {config.image_size} into {FEWEST_PATCHES} to {MOST_TOKENS - 1} patches: give patch_sizes"
        if config.images[-1] != config.image_size or any(config.image_size % image for image in config.images):
            return f"image sizes {_text(config.images)} do not divide the largest, {config.image_size}"
        for image in config.images:
            for patch in config.patches:
                if image % patch:
                    return f"image size {image} is not a whole number of patches of {patch}"
                if tokens(image, patch) > MOST_TOKENS:
                    return f"{tokens(image, patch)} tokens of image {image} and patch {patch} are more than {MOST_TOKENS}"
        for gene, largest in _largest(config).items():
            values = _choices(config)[gene]
            if values[0] < 1:
                return f"choices of {gene} are 1 or more, not {_text(values)}"
            if values[-1] != largest:
                return f"choices of {gene} {_text(values)} do not end with the largest network's {largest}"
        return ""

    def workload(self, config: Any, batch: int, sequence: int) -> Workload:
        """Of the largest image and the smallest patches."""
        side = config.image_size
        return Workload(batch=batch, sequence=tokens(side, config.patches[-1]), resolution=(side, side))

    def inputs(self, config: Any) -> tuple[InputSpec, ...]:
        return (InputSpec("pixel_values", "float32", ("batch", config.num_channels, config.image_size, config.image_size)),)

    def parameters(self, config: Any) -> dict[str, tuple[int, ...]]:
        return parameter_shapes(self, config)

    def segments(self, config: Any) -> tuple[Segment, ...]:
        """embedding (kernels of all images and patches), then attention and mlp of each layer, then head."""
        names = tuple(self.parameters(config))
        found = [Segment("embedding", "embedding", "embeddings", None, None, tuple(n for n in names if n.startswith("embeddings.")))]
        for i in range(config.num_hidden_layers):
            for kind, parts in MAPS.items():
                module = f"layers.{i}.{kind}"
                own = tuple(n for n in names if n.startswith(f"{module}."))
                products = tuple(f"{module}.{part}.{factor}.weight" for part in parts for factor in ("first", "second"))
                start: tuple[str, Literal["input", "output"]] = (f"{module}.norm.weight", "input")
                found.append(Segment(module, kind, module, i, start, own, products, "int8"))
        head = tuple(n for n in names if n.startswith(("norm.", "classifier.")))
        found.append(Segment("head", "head", "classifier", None, ("norm.weight", "input"), head))
        return tuple(found)

    def groups(self, config: Any) -> tuple[Group, ...]:
        """Channels of the residual stream, and of every layer heads, neurons and ranks."""
        stream = [("embeddings.class_token", 0), ("norm.weight", 0), ("norm.bias", 0), ("classifier.weight", 1)]
        for image in config.images:
            for patch in config.patches:
                pair = f"embeddings.pairs.{pair_name(image, patch)}"
                stream += [(f"{pair}.projection.weight", 0), (f"{pair}.projection.bias", 0), (f"{pair}.position", 1)]
        found = []
        for i in range(config.num_hidden_layers):
            attention, mlp = f"layers.{i}.attention", f"layers.{i}.mlp"
            into, onto = [f"{attention}.{part}" for part in ("query", "key", "value")], [f"{attention}.out", f"{mlp}.down"]
            stream += [(f"{block}.norm.{kind}", 0) for block in (attention, mlp) for kind in ("weight", "bias")]
            stream += [(f"{path}.first.weight", 1) for path in (*into, f"{mlp}.up")]
            stream += [(f"{path}.second.{kind}", 0) for path in onto for kind in ("weight", "bias")]
            heads = [(f"{path}.second.{kind}", 0) for path in into for kind in ("weight", "bias")] + [(f"{attention}.out.first.weight", 1)]
            width = [(f"{mlp}.up.second.weight", 0), (f"{mlp}.up.second.bias", 0), (f"{mlp}.down.first.weight", 1)]
            maps = [*into, *onto, f"{mlp}.up"]
            ranks = [(f"{path}.{factor}.weight", axis) for path in maps for factor, axis in (("first", 0), ("second", 1))]
            found += [
                Group(f"layers.{i}.heads", config.head_dim, config.num_attention_heads, tuple(heads), i),
                Group(f"layers.{i}.width", 1, config.intermediate_size, tuple(width), i),
                Group(f"layers.{i}.rank", 1, config.hidden_size, tuple(ranks), i),
            ]
        return (Group("hidden", 1, config.hidden_size, tuple(stream)), *found)

    def choices(self, config: Any, width_multiple: int) -> dict[str, tuple[int, ...]]:
        """The configuration's, sizes of tensors in multiples of what a backend wants; patches descend, so that the last is largest."""
        own = _choices(config)
        cut = {
            gene: tuple(sorted({max(width_multiple, v // width_multiple * width_multiple) for v in own[gene][:-1]} | {own[gene][-1]}))
            for gene in ("hidden", "width", "rank")
        }
        found = {"depth": own["depth"], "hidden": cut["hidden"], "image": config.images, "patch": config.patches}
        for i in range(config.num_hidden_layers):
            found |= {f"layers.{i}.heads": own["heads"], f"layers.{i}.width": cut["width"], f"layers.{i}.rank": cut["rank"]}
        return found

    def further_genes(self, segment: Segment) -> tuple[str, ...]:
        """Genes that decide what a block executes besides those that slice its parameters."""
        return () if segment.kind == "head" else self.unsliced

    def stored(self, config: Any, segment: Segment, values: Mapping[str, int]) -> tuple[Segment, dict[str, tuple[int, ...]]]:
        """The block with the parameters that a sub-network keeps, and their shapes: one pair's kernel, whole maps multiplied out."""
        hidden = values.get("hidden", config.hidden_size)
        if segment.kind == "embedding":
            image, patch = _image_and_patch(config, values)
            pair = f"embeddings.pairs.{pair_name(image, patch)}"
            shapes: dict[str, tuple[int, ...]] = {
                "embeddings.class_token": (hidden,), f"{pair}.projection.weight": (hidden, patch * patch * config.num_channels),
                f"{pair}.projection.bias": (hidden,), f"{pair}.position": (tokens(image, patch), hidden),
            }  # fmt: skip
        elif segment.kind == "head":
            shapes = {"norm.weight": (hidden,), "norm.bias": (hidden,)}
            shapes |= {"classifier.weight": (config.num_labels, hidden), "classifier.bias": (config.num_labels,)}
        else:
            layer = _kept(config, values, segment.layer)
            shapes = {f"{segment.module}.norm.{kind}": (hidden,) for kind in ("weight", "bias")}
            inside = layer.inner if segment.kind == "attention" else layer.hidden
            for part in MAPS[segment.kind]:
                path = f"{segment.module}.{part}"
                inputs, outputs = (inside, hidden) if part in ("out", "down") else (hidden, inside)
                if rank := layer.factors(inputs, outputs):
                    shapes |= {f"{path}.first.weight": (rank, inputs), f"{path}.second.weight": (outputs, rank)}
                else:
                    shapes |= {f"{path}.weight": (outputs, inputs)}
                shapes[f"{path}.bias"] = (outputs,)
        products = tuple(n for n, shape in shapes.items() if segment.quantizable and len(shape) == 2)
        return dataclasses.replace(segment, parameters=tuple(shapes), quantizable=products), shapes

    def operator(
        self, config: Any, segment: Segment, values: Mapping[str, int], workload: Workload, precision: Precision, first: bool = False
    ) -> Operator:  # fmt: skip
        """Those of `vit`, of the sub-network's own tokens; with the image's side, and with a rank where some map is two factors."""
        image, patch = _image_and_patch(config, values)
        hidden = values.get("hidden", config.hidden_size)
        sequence = 1 if first and segment.kind in ("mlp", "head") else tokens(image, patch)
        common = (("batch", workload.batch), ("sequence", sequence), ("hidden", hidden))
        if segment.kind == "embedding":
            own = (("channels", config.num_channels), ("patch", patch), ("image", image))
            return Operator(kind="embedding", dims=(*common, *own), attributes=(("input", "image"),), precision=precision)
        if segment.kind == "head":
            return Operator(kind="head", dims=(*common, ("labels", config.num_labels)), attributes=(("modules", 1),), precision=precision)
        layer = _kept(config, values, segment.layer)
        inside = layer.inner if segment.kind == "attention" else layer.hidden
        rank = layer.factors(hidden, inside)
        low = (("rank", rank),) if rank else ()
        if segment.kind == "mlp":
            return Operator(
                kind="mlp", dims=(*common, ("width", layer.hidden), *low), attributes=(("activation", "gelu"), ("norm", "pre")),
                precision=precision,
            )  # fmt: skip
        return Operator(
            kind="attention", dims=(*common, ("heads", layer.heads), ("head_dim", layer.head_width), *low),
            attributes=(("mask", 0), ("norm", "pre"), *((("out", "first token"),) if first else ())), precision=precision,
        )  # fmt: skip

    def macs(self, operator: Operator) -> int:
        """Products of maps and of attention, each map counted once for all heads."""
        d = dict(operator.dims)
        count = d["batch"] * d["sequence"]
        if operator.kind == "embedding":
            return d["batch"] * (d["sequence"] - 1) * d["hidden"] * d["channels"] * d["patch"] ** 2
        if operator.kind == "head":
            return d["batch"] * d["hidden"] * d["labels"]
        inside = d["heads"] * d["head_dim"] if operator.kind == "attention" else d["width"]
        one = d["rank"] * (d["hidden"] + inside) if "rank" in d else d["hidden"] * inside
        if operator.kind == "mlp":
            return count * 2 * one
        written = d["batch"] if "out" in dict(operator.attributes) else count
        return count * 2 * one + written * 2 * (one + d["sequence"] * inside)

    def activations(self, operator: Operator) -> int:
        """As executed a block at a time: what is added to the block's output is alive throughout, what lies between two factors never."""
        d = dict(operator.dims)
        count = d["batch"] * d["sequence"]
        hidden = count * d["hidden"]
        if operator.kind == "attention":
            inner = d["heads"] * d["head_dim"]
            written = d["batch"] if "out" in dict(operator.attributes) else count
            return hidden + (written + 2 * count) * inner + max(hidden, written * d["heads"] * d["sequence"])
        if operator.kind == "mlp":
            return 2 * hidden + count * d["width"]
        if operator.kind == "head":
            return hidden + d["batch"] * (d["hidden"] + max(d["hidden"], d["labels"]))
        return hidden + d["batch"] * d["channels"] * d["image"] ** 2

    def create(self, config: Any) -> Any:
        model = McuVitForImageClassification(config)
        if not model.classifier.weight.is_meta:
            model.initialize()
        return model.eval()

    def load(self, folder: str, **config: Any) -> Any:
        return load_pretrained(McuVitForImageClassification, folder, **config)

    def forward(
        self, model: Any, inputs: Mapping[str, torch.Tensor], layers: tuple[int, ...], values: Mapping[str, int], linear: Linear
    ) -> torch.Tensor:
        """Of images of the largest size, which are averaged down to the sub-network's."""
        return run(model, inputs["pixel_values"], layers, values, linear)

    @torch.no_grad()
    def settle(self, model: Any) -> None:
        """Factors made anew of their products, in place: the same function, and prefixes of the factors are its best approximations."""
        for module in model.modules():
            if isinstance(module, Factors):
                module.divide(module.second.weight @ module.first.weight)

    def shrink(self, model: Any, layers: tuple[int, ...], values: Mapping[str, int]) -> None:
        """Drop layers and the kernels of other images and patches; multiply out what is whole."""
        config, hidden = model.config, values["hidden"]
        image, patch = _image_and_patch(config, values)
        own = [_kept(config, values, i) for i in layers]
        model.embeddings.pairs = nn.ModuleDict({(name := pair_name(image, patch)): model.embeddings.pairs[name]})
        model.layers = nn.ModuleList(model.layers[i] for i in layers)
        for block, layer in zip(model.layers, own, strict=True):
            for module, inside in ((block.attention, layer.inner), (block.mlp, layer.hidden)):
                if not layer.factors(hidden, inside):
                    for name, child in list(module.named_children()):
                        if isinstance(child, Factors):
                            setattr(module, name, child.whole())
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.normalized_shape = (hidden,)
        config.layer_heads, config.layer_widths = [layer.heads for layer in own], [layer.hidden for layer in own]
        config.layer_ranks = [layer.rank for layer in own]
        config.num_hidden_layers, config.hidden_size = len(layers), hidden
        config.hidden_sizes, config.image_sizes, config.patch_sizes = [hidden], [image], [patch]


def _largest(config: McuVitConfig) -> dict[str, int]:
    return {
        "depth": config.num_hidden_layers, "hidden": config.hidden_size, "heads": config.num_attention_heads,
        "width": config.intermediate_size, "rank": config.hidden_size,
    }  # fmt: skip


def _choices(config: McuVitConfig) -> dict[str, tuple[int, ...]]:
    """Values of every kind of gene that is the same in all layers, ascending: those given, or shares of the largest network."""
    layers, hidden, width = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    given = {
        "depth": config.depths or range(max(1, round(layers * 3 / 8)), layers + 1),
        "hidden": config.hidden_sizes or (hidden // 2, hidden * 3 // 4, hidden),
        "heads": config.heads or range(1, config.num_attention_heads + 1),
        "width": config.widths or (math.ceil(width / 6), width // 3, width * 2 // 3, width),
        "rank": config.ranks or (hidden // 4, hidden // 2, hidden),
    }
    return {gene: tuple(sorted(set(values))) for gene, values in given.items()}


def _text(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))


PLUGIN = McuVit()

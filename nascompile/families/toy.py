"""A residual MLP over feature vectors, small enough for the whole pipeline to run in seconds.

It has one gene of each scope, so that nothing in the pipeline assumes a transformer: `hidden` is global, `width` is per layer,
`rank` is per linear (the second product of a block is two factors).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel

from nascompile.families import Group, InputSpec, Linear, Segment
from nascompile.families.encoder import load_pretrained, parameter_shapes
from nascompile.records import Operator, Precision, Workload


class ToyConfig(PretrainedConfig):  # type: ignore[misc]
    model_type = "nascompile-toy"

    def __init__(self, features: int = 16, hidden: int = 32, width: int = 64, rank: int = 32, layers: int = 4, **rest: Any) -> None:
        super().__init__(**rest)
        self.features, self.hidden, self.width, self.rank, self.layers = features, hidden, width, rank, layers


class ToyBlock(nn.Module):
    def __init__(self, hidden: int, width: int, rank: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.up = nn.Linear(hidden, width)
        self.down = nn.Linear(width, rank, bias=False)
        self.out = nn.Linear(rank, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.out(self.down(F.relu(self.up(self.norm(x)))))
        return y


class ToyForClassification(PreTrainedModel):  # type: ignore[misc]
    config_class = ToyConfig
    base_model_prefix = "toy"
    main_input_name = "features"
    _supports_sdpa = True

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.embed = nn.Linear(config.features, config.hidden)
        self.blocks = nn.ModuleList(ToyBlock(config.hidden, config.width, config.rank) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.hidden)
        self.classifier = nn.Linear(config.hidden, config.num_labels)
        self.post_init()

    def forward(self, features: torch.Tensor) -> Any:
        """Logits (batch, labels) as the `logits` of a Hugging Face output."""
        from transformers.modeling_outputs import SequenceClassifierOutput

        x = self.embed(features)
        for block in self.blocks:
            x = block(x)
        return SequenceClassifierOutput(logits=self.classifier(self.norm(x)))


class Toy:
    name = "toy"
    model_types = (ToyConfig.model_type,)
    reads_first_token = False

    def unsupported(self, config: Any) -> str:
        """Every toy configuration is handled."""
        return ""

    def workload(self, config: Any, batch: int, sequence: int) -> Workload:
        return Workload(batch=batch)

    def inputs(self, config: Any) -> tuple[InputSpec, ...]:
        return (InputSpec("features", "float32", ("batch", config.features)),)

    def parameters(self, config: Any) -> dict[str, tuple[int, ...]]:
        return parameter_shapes(self, config)

    def segments(self, config: Any) -> tuple[Segment, ...]:
        found = [Segment("embedding", "embedding", "embed", None, None, ("embed.weight", "embed.bias"))]
        for i in range(config.layers):
            parts = ("norm.weight", "norm.bias", "up.weight", "up.bias", "down.weight", "out.weight", "out.bias")
            names = tuple(f"blocks.{i}.{part}" for part in parts)
            weights = tuple(n for n in names if n.endswith(".weight") and "norm" not in n)
            found.append(Segment(f"layers.{i}.mlp", "mlp", f"blocks.{i}", i, (names[0], "input"), names, weights, "int8"))
        head = ("norm.weight", "norm.bias", "classifier.weight", "classifier.bias")
        found.append(Segment("head", "head", "classifier", None, ("norm.weight", "input"), head))
        return tuple(found)

    def groups(self, config: Any) -> tuple[Group, ...]:
        hidden = [("embed.weight", 0), ("embed.bias", 0), ("norm.weight", 0), ("norm.bias", 0), ("classifier.weight", 1)]
        found = []
        for i in range(config.layers):
            p = f"blocks.{i}"
            hidden += [(f"{p}.norm.weight", 0), (f"{p}.norm.bias", 0), (f"{p}.up.weight", 1), (f"{p}.out.weight", 0), (f"{p}.out.bias", 0)]
            found.append(
                Group(f"layers.{i}.width", 1, config.width, ((f"{p}.up.weight", 0), (f"{p}.up.bias", 0), (f"{p}.down.weight", 1)), i)
            )
            found.append(Group(f"layers.{i}.rank", 1, config.rank, ((f"{p}.down.weight", 0), (f"{p}.out.weight", 1)), i))
        return (Group("hidden", 1, config.hidden, tuple(hidden)), *found)

    def choices(self, config: Any, width_multiple: int) -> dict[str, tuple[int, ...]]:
        """Halves of everything; too small a net for a backend's multiples to matter."""
        found = {"depth": tuple(range(config.layers // 2, config.layers + 1)), "hidden": (config.hidden // 2, config.hidden)}
        for i in range(config.layers):
            found[f"layers.{i}.width"] = (config.width // 4, config.width // 2, config.width)
            found[f"layers.{i}.rank"] = (config.rank // 2, config.rank)
        return found

    def operator(
        self, config: Any, segment: Segment, values: Mapping[str, int], workload: Workload, precision: Precision, first: bool = False
    ) -> Operator:  # fmt: skip
        common = (("batch", workload.batch), ("hidden", values["hidden"]))
        if segment.kind == "embedding":
            return Operator(kind="embedding", dims=(*common, ("features", config.features)), precision=precision)
        if segment.kind == "head":
            return Operator(kind="head", dims=(*common, ("labels", config.num_labels)), precision=precision)
        own = (("width", values[f"layers.{segment.layer}.width"]), ("rank", values[f"layers.{segment.layer}.rank"]))
        return Operator(kind="mlp", dims=common + own, precision=precision)

    def macs(self, operator: Operator) -> int:
        d = dict(operator.dims)
        if operator.kind == "mlp":
            return d["batch"] * (d["hidden"] * d["width"] + d["width"] * d["rank"] + d["rank"] * d["hidden"])
        return d["batch"] * d["hidden"] * d.get("features", d.get("labels", 0))

    def activations(self, operator: Operator) -> int:
        """A block's input is added to its output, and alive until then."""
        d = dict(operator.dims)
        if operator.kind == "mlp":
            return d["batch"] * (d["hidden"] + max(d["hidden"] + d["width"], d["width"] + d["rank"], d["rank"] + d["hidden"]))
        return d["batch"] * (d["hidden"] + d.get("features", d["hidden"] + d.get("labels", 0)))

    def create(self, config: Any) -> Any:
        return ToyForClassification(config).eval()

    def load(self, folder: str, **config: Any) -> Any:
        return load_pretrained(ToyForClassification, folder, **config)

    def forward(
        self, model: Any, inputs: Mapping[str, torch.Tensor], layers: tuple[int, ...], values: Mapping[str, int], linear: Linear
    ) -> torch.Tensor:
        h = values["hidden"]
        x = F.linear(inputs["features"], model.embed.weight[:h], model.embed.bias[:h])
        for i in layers:
            block, p = model.blocks[i], f"blocks.{i}"
            width, rank = values[f"layers.{i}.width"], values[f"layers.{i}.rank"]
            y = F.layer_norm(x, (h,), block.norm.weight[:h], block.norm.bias[:h], block.norm.eps)
            y = F.relu(linear(f"{p}.up.weight", y, block.up.weight[:width, :h], block.up.bias[:width]))
            y = linear(f"{p}.down.weight", y, block.down.weight[:rank, :width], None)
            x = x + linear(f"{p}.out.weight", y, block.out.weight[:h, :rank], block.out.bias[:h])
        x = F.layer_norm(x, (h,), model.norm.weight[:h], model.norm.bias[:h], model.norm.eps)
        return F.linear(x, model.classifier.weight[:, :h], model.classifier.bias)

    def shrink(self, model: Any, layers: tuple[int, ...], values: Mapping[str, int]) -> None:
        """Drop blocks; LayerNorms were sliced with their parameters and only need their shape said again."""
        model.blocks = nn.ModuleList(model.blocks[i] for i in layers)
        for norm in (model.norm, *(block.norm for block in model.blocks)):
            norm.normalized_shape = (values["hidden"],)
        config = model.config
        config.layers, config.hidden = len(layers), values["hidden"]
        for name in ("width", "rank"):
            if len(sizes := {values[f"layers.{i}.{name}"] for i in layers}) == 1:
                setattr(config, name, sizes.pop())


def demo_data(samples: int, seed: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Synthetic features (samples, 16) and labels (samples,) of three overlapping classes: a nonlinear rule and noise."""
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((samples, 16)).astype(np.float32)
    rule = np.random.default_rng(0).standard_normal((16, 3)).astype(np.float32)
    logits = np.tanh(features @ rule) + 0.5 * (features[:, :3] * features[:, 3:6]) + rng.gumbel(size=(samples, 3)) * 0.15
    return features, logits.argmax(axis=1).astype(np.int64)


PLUGIN = Toy()

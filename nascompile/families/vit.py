"""Vision transformers: Hugging Face `ViTForImageClassification` (ViT, DeiT weights stored as ViT)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from nascompile.families import InputSpec, Linear
from nascompile.families.encoder import Dims, EncoderFamily, Layout, load_pretrained
from nascompile.records import Operator, Precision, Workload


class Vit(EncoderFamily):
    name = "vit"
    model_types = ("vit",)

    def unsupported(self, config: Any) -> str:
        """Needs square images cut into whole patches."""
        size, patch = _pair(config.image_size), _pair(config.patch_size)
        if size[0] % patch[0] or size[1] % patch[1] or patch[0] != patch[1]:
            return f"image size {size} is not a whole number of {patch} patches"
        return ""

    def layout(self, config: Any) -> Layout:
        return Layout(
            layer="vit.layers.{i}", query="attention.q_proj", key="attention.k_proj", value="attention.v_proj", out="attention.o_proj",
            fc1="mlp.fc1", fc2="mlp.fc2", attention_norm="layernorm_before", mlp_norm="layernorm_after", pre_norm=True,
            embedding="vit.embeddings", head=("classifier",), final_norm="vit.layernorm",
        )  # fmt: skip

    def dims(self, config: Any) -> Dims:
        return Dims(config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.intermediate_size, config.hidden_act)

    def workload(self, config: Any, batch: int, sequence: int) -> Workload:
        """Sequence: patches and the class token."""
        (height, width), (patch, _) = _pair(config.image_size), _pair(config.patch_size)
        return Workload(batch=batch, sequence=(height // patch) * (width // patch) + 1, resolution=(height, width))

    def inputs(self, config: Any) -> tuple[InputSpec, ...]:
        return (InputSpec("pixel_values", "float32", ("batch", config.num_channels, *_pair(config.image_size))),)

    def embedding_operator(self, config: Any, workload: Workload, precision: Precision) -> Operator:
        dims = (
            ("batch", workload.batch), ("sequence", workload.sequence), ("hidden", config.hidden_size),
            ("channels", config.num_channels), ("patch", _pair(config.patch_size)[0]),
        )  # fmt: skip
        return Operator(kind="embedding", dims=dims, attributes=(("input", "image"),), precision=precision)

    def create(self, config: Any) -> Any:
        from transformers import ViTForImageClassification

        config._attn_implementation = "eager"
        return ViTForImageClassification(config).eval()

    def load(self, folder: str, **config: Any) -> Any:
        from transformers import ViTForImageClassification

        return load_pretrained(ViTForImageClassification, folder, **config)

    def embed(self, model: Any, inputs: Mapping[str, torch.Tensor], linear: Linear) -> torch.Tensor:
        return model.vit.embeddings(inputs["pixel_values"])  # type: ignore[no-any-return]

    def classify(self, model: Any, hidden: torch.Tensor) -> torch.Tensor:
        return model.classifier(hidden[:, 0])  # type: ignore[no-any-return]


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


PLUGIN = Vit()

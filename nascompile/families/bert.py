"""BERT and its kin for sequence classification: BERT and MiniLM, RoBERTa and XLM-R, DistilBERT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from nascompile.families import InputSpec, Linear
from nascompile.families.encoder import Dims, EncoderFamily, Layout, load_pretrained
from nascompile.records import Operator, Precision, Workload


def _bert_layout(base: str, head: tuple[str, ...]) -> Layout:
    return Layout(
        layer=f"{base}.encoder.layer.{{i}}", query="attention.self.query", key="attention.self.key", value="attention.self.value",
        out="attention.output.dense", fc1="intermediate.dense", fc2="output.dense", attention_norm="attention.output.LayerNorm",
        mlp_norm="output.LayerNorm", pre_norm=False, embedding=f"{base}.embeddings", head=head,
        tables=(f"{base}.embeddings.word_embeddings.weight",),
    )  # fmt: skip


_ROBERTA = _bert_layout("roberta", ("classifier.dense", "classifier.out_proj"))
_LAYOUTS = {
    "bert": _bert_layout("bert", ("bert.pooler.dense", "classifier")),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "distilbert": Layout(
        layer="distilbert.transformer.layer.{i}", query="attention.q_lin", key="attention.k_lin", value="attention.v_lin",
        out="attention.out_lin", fc1="ffn.lin1", fc2="ffn.lin2", attention_norm="sa_layer_norm", mlp_norm="output_layer_norm",
        pre_norm=False, embedding="distilbert.embeddings", head=("pre_classifier", "classifier"),
        tables=("distilbert.embeddings.word_embeddings.weight",),
    ),
}  # fmt: skip


class Bert(EncoderFamily):
    name = "bert"
    model_types = tuple(_LAYOUTS)
    masked = True

    def unsupported(self, config: Any) -> str:
        """Needs an encoder with absolute positions."""
        if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
            return "it is configured as a decoder"
        if (kind := getattr(config, "position_embedding_type", "absolute") or "absolute") != "absolute":
            return f"its position embeddings are {kind}; absolute ones are supported"
        if getattr(config, "chunk_size_feed_forward", 0):
            return "chunk_size_feed_forward is set; set it to 0"
        return ""

    def layout(self, config: Any) -> Layout:
        return _LAYOUTS[config.model_type]

    def dims(self, config: Any) -> Dims:
        if config.model_type == "distilbert":
            return Dims(config.dim, config.n_layers, config.n_heads, config.hidden_dim, config.activation)
        return Dims(config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.intermediate_size, config.hidden_act)

    def workload(self, config: Any, batch: int, sequence: int) -> Workload:
        return Workload(batch=batch, sequence=sequence)

    def inputs(self, config: Any) -> tuple[InputSpec, ...]:
        shape = ("batch", "sequence")
        found = [InputSpec("input_ids", "int64", shape, config.vocab_size), InputSpec("attention_mask", "int64", shape, 2)]
        if config.model_type == "bert":
            found.append(InputSpec("token_type_ids", "int64", shape, config.type_vocab_size))
        return tuple(found)

    def embedding_operator(self, config: Any, workload: Workload, precision: Precision) -> Operator:
        dims = (
            ("batch", workload.batch), ("sequence", workload.sequence), ("hidden", self.dims(config).hidden),
            ("vocabulary", config.vocab_size),
        )  # fmt: skip
        return Operator(kind="embedding", dims=dims, attributes=(("input", "text"),), precision=precision)

    def create(self, config: Any) -> nn.Module:
        config._attn_implementation = "eager"
        return _classes()[config.model_type](config).eval()  # type: ignore[no-any-return]

    def load(self, folder: str, **config: Any) -> nn.Module:
        from transformers import AutoConfig

        return load_pretrained(_classes()[AutoConfig.from_pretrained(folder).model_type], folder, **config)

    def embed(self, model: Any, inputs: Mapping[str, torch.Tensor], linear: Linear) -> torch.Tensor:
        """(batch, sequence, hidden); the table goes through `linear` as a look-up: x is the indices, no bias."""
        layout = self.layout(model.config)
        embeddings = model.get_submodule(layout.embedding)
        table = embeddings.word_embeddings.weight
        words = linear(layout.tables[0], inputs["input_ids"], table, None)
        if model.config.model_type == "bert":
            return embeddings(inputs_embeds=words, token_type_ids=inputs["token_type_ids"])  # type: ignore[no-any-return]
        if model.config.model_type == "distilbert":
            return embeddings(None, inputs_embeds=words)  # type: ignore[no-any-return]
        # RoBERTa numbers positions from the padding index, over real tokens only: its module needs the ids for that
        real = inputs["input_ids"].ne(embeddings.padding_idx).int()
        positions = (torch.cumsum(real, dim=1) * real).long() + embeddings.padding_idx
        return embeddings(inputs_embeds=words, position_ids=positions)  # type: ignore[no-any-return]

    def classify(self, model: Any, hidden: torch.Tensor) -> torch.Tensor:
        if model.config.model_type == "bert":
            return model.classifier(model.dropout(model.bert.pooler(hidden)))  # type: ignore[no-any-return]
        if model.config.model_type == "distilbert":
            return model.classifier(model.dropout(F.relu(model.pre_classifier(hidden[:, 0]))))  # type: ignore[no-any-return]
        return model.classifier(hidden)  # type: ignore[no-any-return]

    def shrink(self, model: Any, layers: tuple[int, ...], values: Mapping[str, int]) -> None:
        super().shrink(model, layers, values)
        if model.config.model_type == "distilbert":
            model.config.n_layers = len(layers)


def _classes() -> dict[str, Any]:
    from transformers import (
        BertForSequenceClassification,
        DistilBertForSequenceClassification,
        RobertaForSequenceClassification,
        XLMRobertaForSequenceClassification,
    )

    return {
        "bert": BertForSequenceClassification, "roberta": RobertaForSequenceClassification,
        "xlm-roberta": XLMRobertaForSequenceClassification, "distilbert": DistilBertForSequenceClassification,
    }  # fmt: skip


PLUGIN = Bert()

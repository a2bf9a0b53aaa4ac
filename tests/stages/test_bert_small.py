"""Own model and own data: a small random BERT and a table of texts, timed on this machine's processor through either runtime."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import nascompile
from nascompile import cli, data, engine, measure, pipeline, plugins
from nascompile.records import Choice, EngineManifest, LatencyTable, Measurement, load
from nascompile.settings import Budgets, FinetuneSettings, Recipe

GOOD = ("superb", "delightful", "brilliant", "moving")
BAD = ("dreadful", "tedious", "clumsy", "hollow")
PLAIN = ("the", "film", "was", "a", "story", "actor", "scene", "music", "plot", "in", "with", "some", "its", "end")
RECIPE = """
profile_seconds = 1.0
[finetune]
batch_size = 8
learning_rate = 2e-3
[search]
population = 4
calibration_samples = 32
calibration_methods = ["minmax"]
[measure]
seconds = 0.2
batches = [1]
agreement = 2
"""


def sentence(words: tuple[str, ...], rng: np.random.Generator) -> str:
    """Eight plain words with one of `words` somewhere among them."""
    found = [str(w) for w in rng.choice(PLAIN, 8)]
    found.insert(int(rng.integers(9)), str(rng.choice(words)))
    return " ".join(found)


def labelled(count: int, seed: int) -> list[tuple[str, str]]:
    rng = np.random.default_rng(seed)
    return [(sentence(GOOD if i % 2 else BAD, rng), "positive" if i % 2 else "negative") for i in range(count)]


def write_csv(path: Path, rows: list[tuple[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("review", "sentiment"), *rows])
    return path


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random BERT without a head and a WordPiece tokenizer of a few words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {token: i for i, token in enumerate([*special, *GOOD, *BAD, *PLAIN, "un", "##watch", "##able"])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def made(request: Any, bert: Path, into: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working folder of a whole run of the command line on the model and a CSV file; the run is in `run`."""
    if reason := plugins.get("backends", request.param).unavailable():
        pytest.skip(reason)
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        folder = into(tmp_path_factory.mktemp("made"), patch)
        patch.setattr(measure, "LATENCY_SECONDS", 0.3)
        Path("recipe.toml").write_text(RECIPE)
        write_csv(Path("reviews.csv"), labelled(640, 0))
        command = (
            "run recipe.toml --data reviews.csv --text-column review --label-column sentiment --max-drop 5 --epochs 1 --teacher-epochs 2 "
            "--evaluations 8 --top-k 1 --out run --json"
        )
        done = CliRunner().invoke(cli.app, [*command.split(), "--backend", request.param, "--model", str(bert)])
        assert done.exit_code == 0, done.output
        (folder / "stdout.json").write_text(done.stdout)
        return folder


def chosen(folder: Path) -> Path:
    return folder / "run" / "engines" / load(folder / "run" / "choice.json", Choice).engine


def test_the_run_is_measured_on_this_machine_and_within_its_budget(made: Path) -> None:
    task = json.loads((made / "stdout.json").read_text())["tasks"][0]
    assert task["chosen"]["p50_ms"] > 0
    m = {p.stem: load(p, Measurement) for p in (made / "run" / "measurements").glob("*.json")}
    assert set(m) == {"baseline", "uniform-int8", "candidate-1"}
    assert {x.latency.kind for x in m.values()} == {"measured"}
    assert all(x.peak_memory_bytes > 0 for x in m.values())
    assert m["baseline"].score.value >= 95  # one of eight words decides
    assert m["baseline"].score.value - m[chosen(made).name].score.value <= 5
    full, quantized = (load(made / "run" / "engines" / name / "manifest.json", EngineManifest) for name in ("baseline", "uniform-int8"))
    if "int8" in dict(quantized.precision_counts):  # openvino has none on processors that multiply integers inexactly
        assert _weight_bytes(made, quantized) < 0.6 * _weight_bytes(made, full)
    assert data.load_manifest(made / "run" / "data").max_length == 16  # eleven tokens, up to a multiple of 8


def _weight_bytes(made: Path, manifest: EngineManifest) -> int:
    """The file with the weights: beside it OpenVINO describes the graph, in more bytes than a network of this size has."""
    return (made / "run" / "engines" / manifest.name / manifest.graphs[-1]).stat().st_size


def test_the_baseline_engine_computes_what_transformers_does(made: Path, bert: Path) -> None:
    """Other padding, other code: the model's own tokenizer and module."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    texts = [text for text, _ in labelled(40, 9)] + ["Unwatchable !", "superb", "in the end a story " * 12]
    tokenizer, model = AutoTokenizer.from_pretrained(bert), AutoModelForSequenceClassification.from_pretrained(made / "run" / "teacher")
    with torch.no_grad():
        wanted = model.eval()(**tokenizer(texts, padding=True, truncation=True, max_length=16, return_tensors="pt")).logits.numpy()
    found = engine.load(made / "run" / "engines" / "baseline").logits(texts)
    # the sums of a few hundred float32 products in another order
    np.testing.assert_allclose(found, wanted, atol=1e-3)


def test_every_engine_verifies_and_predicts_the_right_labels(made: Path) -> None:
    rows = labelled(100, 7)
    for folder in (made / "run" / "engines").iterdir():
        assert engine.verify(folder)[-1].name == "sample"
    found = nascompile.load(chosen(made)).predict([text for text, _ in rows])
    right = np.mean([label == truth for (label, _), (_, truth) in zip(found, rows, strict=True)])
    assert right >= 0.9  # within five points of a baseline that is right nearly always
    assert all(0.5 <= share <= 1 for _, share in found)


def test_run_py_needs_its_runtime_and_nothing_of_ours(made: Path) -> None:
    folder = chosen(made)
    backend = load(folder / "manifest.json", EngineManifest).target.backend
    (other,) = {"onnxruntime", "openvino"} - {backend}
    texts = [text for text, _ in labelled(4, 8)]
    code = (
        "import runpy, sys\n"
        "unwanted = ('torch', 'transformers', 'nascompile', 'msgspec', 'onnx', sys.argv[1])\n"
        "class Forbidden:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in unwanted: raise ImportError(name)\n"
        "sys.meta_path.insert(0, Forbidden())\n"
        "sys.argv = sys.argv[2:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, other, str(folder / "run.py"), *texts], capture_output=True, text=True, check=False, cwd=made.parent
    )
    assert done.returncode == 0, done.stderr
    labels = [label for label, _ in engine.load(folder).predict(texts)]
    assert [next(name for name in ("positive", "negative") if name in line) for line in done.stdout.splitlines()[-4:]] == labels


def test_the_table_was_filled_here_and_is_found_again(made: Path) -> None:
    table = load(made / "run" / "table.json", LatencyTable)
    assert {row.operator.kind for row in table.rows} >= {"embedding", "attention", "mlp", "head"}
    assert all(row.latency.kind == "measured" and row.latency.value >= 0 for row in table.rows)
    stored = list((made / "latency_tables" / "cpu").glob("*.json"))
    assert [load(path, LatencyTable) for path in stored] == [table]


# ---------------------------------------------------------------------------------------------- a model that has its head


@pytest.fixture
def fine_tuned(made: Path, bert: Path, tmp_path: Path) -> Path:
    """The run's teacher as somebody would publish it, its classes in the other order."""
    import shutil

    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(made / "run" / "teacher")
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.copy_(parameter.flip(0).clone())
    model.config.id2label, model.config.label2id = {0: "POSITIVE", 1: "NEGATIVE"}, {"POSITIVE": 0, "NEGATIVE": 1}
    model.save_pretrained(tmp_path / "published")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bert / name, tmp_path / "published")
    return tmp_path / "published"


def test_a_fine_tuned_model_keeps_its_head(fine_tuned: Path, elsewhere: Path) -> None:
    from safetensors.numpy import load_file

    rows = [(text, label.capitalize()) for text, label in labelled(200, 4)]
    write_csv(Path("reviews.csv"), rows)
    recipe = Recipe(
        model=str(fine_tuned), device="fake", budgets=Budgets(max_drop=20.0), profile_seconds=0.1,
        data=data.DataSettings(data="reviews.csv", text_columns=("review",), label_column="sentiment"),
        finetune=FinetuneSettings(epochs=1, teacher_epochs=9),
    )  # fmt: skip
    small = {"evaluations": 3, "population": 2, "calibration_samples": 16, "calibration_methods": ("minmax",)}
    recipe = msgspec.structs.replace(recipe, search=msgspec.structs.replace(recipe.search, **small))
    pipeline.run(recipe, Path("run"), until="build")
    manifest = data.load_manifest(Path("run/data"))
    assert (manifest.head, manifest.label_names) == ("kept", ("POSITIVE", "NEGATIVE"))
    given, teacher = (load_file(folder / "model.safetensors") for folder in (fine_tuned, Path("run/teacher")))
    assert all(np.array_equal(given[name], teacher[name]) for name in given)  # no epoch of a teacher's training
    baseline = engine.load("run/engines/baseline")
    found = [label for label, _ in baseline.predict([text for text, _ in rows[:40]])]
    assert np.mean([label == truth.upper() for label, (_, truth) in zip(found, rows, strict=False)]) >= 0.9


# ---------------------------------------------------------------------------------------------- other forms of input


def test_pairs_of_texts_in_json_lines(bert: Path, elsewhere: Path) -> None:
    from transformers import AutoTokenizer

    rows = [(a, b, "same" if i % 3 else "other") for i, ((a, _), (b, _)) in enumerate(zip(labelled(90, 1), labelled(90, 2), strict=True))]
    lines = (json.dumps({"premise": a, "hypothesis": b, "verdict": label, "id": i}) for i, (a, b, label) in enumerate(rows))
    Path("pairs.jsonl").write_text("\n".join(lines))
    chosen_columns = data.DataSettings(data="pairs.jsonl", text_columns=("premise", "hypothesis"), label_column="verdict")
    recipe = Recipe(model=str(bert), device="fake", budgets=Budgets(max_drop=1.0), data=chosen_columns)
    pipeline.run(recipe, Path("run"), until="data")
    split = data.open_split(Path("run/data"), "train")
    tokenizer, names = AutoTokenizer.from_pretrained(bert), data.load_manifest(Path("run/data")).label_names
    columns = [split.arrays()[name] for name in ("input_ids", "token_type_ids", "attention_mask")]
    stored = {
        (tuple(ids[mask == 1]), tuple(types[mask == 1]), names[label])
        for ids, types, mask, label in zip(*columns, split.labels, strict=True)
    }
    encoded = [(tokenizer(a, b), label) for a, b, label in rows]
    assert stored <= {(tuple(e["input_ids"]), tuple(e["token_type_ids"]), label) for e, label in encoded}
    assert len(stored) == len(split)


def test_a_folder_of_images(elsewhere: Path) -> None:
    from PIL import Image
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=28, patch_size=7, num_channels=1
    )
    ViTForImageClassification(config).save_pretrained("vit")
    described = {"do_resize": True, "size": {"height": 28, "width": 28}, "image_mean": [0.25], "image_std": [0.5], "resample": 2}
    Path("vit/preprocessor_config.json").write_text(json.dumps(described))
    rng = np.random.default_rng(0)
    pixels = {}
    for label in ("boot", "bag"):
        (Path("images") / label).mkdir(parents=True)
        for i in range(20):
            image = rng.integers(0, 256, (28, 28), dtype=np.uint8)
            Image.fromarray(image).save(f"images/{label}/{i}.png")
            pixels[image.tobytes()] = label
    recipe = Recipe(
        model="vit", new_head=True, device="fake", budgets=Budgets(max_drop=1.0), data=data.DataSettings(data="images"), profile_seconds=0.1
    )
    pipeline.run(recipe, Path("run"), until="profile")
    split, names = data.open_split(Path("run/data"), "train"), data.load_manifest(Path("run/data")).label_names
    assert names == ("bag", "boot")
    for values, label in zip(split.arrays()["pixel_values"], split.labels, strict=True):
        assert values.shape == (1, 28, 28)
        image = np.rint((values[0] * 0.5 + 0.25) * 255).astype(np.uint8)
        assert pixels[image.tobytes()] == names[label]
    table = load(Path("run/table.json"), LatencyTable)
    assert table.target.workload.resolution == (28, 28)
    assert {row.operator.kind for row in table.rows} >= {"attention", "mlp"}
    assert {dict(row.operator.dims)["labels"] for row in table.rows if row.operator.kind == "head"} == {2}

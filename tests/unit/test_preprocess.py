"""Preprocessing against transformers' own tokenizers and image processors, and against plain NumPy."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from nascompile.errors import DataError, ModelError, RecordError
from nascompile.preprocess import Preprocessor, choose_max_length

WORDS = ["the", "a", "film", "movie", "is", "was", "good", "bad", "great", "un", "##able", "##s", "##ly", "very", "plot", "café"]
MARKS = ["!", ",", "."]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *MARKS, "one", "two"]
BERT = {"model_type": "bert", "vocab_size": len(VOCABULARY), "max_position_embeddings": 32, "type_vocab_size": 2, "pad_token_id": 0}
VIT = {"model_type": "vit", "image_size": [12, 10], "num_channels": 3, "patch_size": 2}
PIECES = ["the", "films", "unable", "x", "ÉTÉ", "!?", "中", "\t"]
TEXTS = ["The film was GOOD!", "", "un unable films, very very badly", "café " * 30, "one", "  the plot was strange.  "]


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer as old checkpoints have it, converted by transformers."""
    slow = tmp_path_factory.mktemp("slow")
    (slow / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    (slow / "config.json").write_text(json.dumps(BERT))
    (slow / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True}))
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("bert")
    AutoTokenizer.from_pretrained(slow).save_pretrained(folder)
    (folder / "slow").symlink_to(slow)
    return folder


def vit_folder(folder: Path, **described: object) -> Path:
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "ViTImageProcessor", **described}))
    return folder


def noise(height: int = 21, width: int = 17, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------ text


@pytest.mark.parametrize("pad", ["max_length", "longest"])
@pytest.mark.parametrize("pairs", [False, True])
def test_texts_are_encoded_as_transformers_does(bert_folder: Path, pad: str, pairs: bool) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(bert_folder)
    samples = list(zip(TEXTS, TEXTS[::-1], strict=True)) if pairs else TEXTS
    stripped = [[t.strip() for t in column] for column in zip(*samples, strict=True)] if pairs else [[t.strip() for t in samples]]
    got = Preprocessor.from_model_folder(bert_folder, BERT, max_length=16)(samples, pad=pad)
    want = reference(*stripped, padding=pad, truncation=True, max_length=16, return_tensors="np")
    assert list(got) == ["input_ids", "attention_mask", "token_type_ids"]
    for name, values in got.items():
        assert values.dtype == np.int64
        assert np.array_equal(values, want[name]), name
    assert got["token_type_ids"].any() == pairs


@given(st.lists(st.lists(st.sampled_from(PIECES), max_size=12).map(" ".join), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_any_text_is_encoded_as_transformers_does(bert_folder: Path, texts: list[str]) -> None:
    from transformers import AutoTokenizer

    want = AutoTokenizer.from_pretrained(bert_folder)([t.strip() for t in texts], padding="max_length", truncation=True, max_length=8)
    got = Preprocessor.from_model_folder(bert_folder, BERT, max_length=8)(texts)
    assert got["input_ids"].tolist() == want["input_ids"]
    assert got["attention_mask"].tolist() == want["attention_mask"]


def test_padding_side_and_model_without_segments(bert_folder: Path, tmp_path: Path) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((bert_folder / file).read_bytes())
    described = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**described, "padding_side": "left"}))
    distilbert = {**BERT, "model_type": "distilbert", "type_vocab_size": 0}
    got = Preprocessor.from_model_folder(tmp_path, distilbert, max_length=6)(["good film"])
    assert list(got) == ["input_ids", "attention_mask"]
    assert got["attention_mask"].tolist() == [[0, 0, 1, 1, 1, 1]]
    assert got["input_ids"][0, :2].tolist() == [0, 0]


def test_an_old_vocabulary_is_converted(bert_folder: Path) -> None:
    texts = ["the unable film", "café!"]
    old = Preprocessor.from_model_folder(bert_folder / "slow", BERT, max_length=8)
    assert old(texts)["input_ids"].tolist() == Preprocessor.from_model_folder(bert_folder, BERT, max_length=8)(texts)["input_ids"].tolist()
    assert "tokenizer.json" in old.files()


def test_stored_folder_gives_the_same_and_opens_in_transformers(bert_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    original = Preprocessor.from_model_folder(bert_folder, BERT, max_length=16)
    run = tmp_path / "run"
    for target in (tmp_path / "engine", run / "data" / "preprocessor"):
        target.mkdir(parents=True)
        for name, content in original.files().items():
            (target / name).write_bytes(content)
    (tmp_path / "engine" / "config.json").write_text(json.dumps(BERT))
    for folder in (tmp_path / "engine", run):
        stored = Preprocessor.from_folder(folder)
        assert stored.settings == original.settings
        assert stored(TEXTS)["input_ids"].tolist() == original(TEXTS)["input_ids"].tolist()
    assert AutoTokenizer.from_pretrained(tmp_path / "engine")("good film")["input_ids"] == [2, 11, 7, 3]


def test_maximum_length_holds_95_percent_and_is_a_multiple_of_8(bert_folder: Path) -> None:
    tokenizer = Preprocessor.from_model_folder(bert_folder, BERT).tokenizer
    short, long = "film " * 6, "film " * 9  # 8 and 11 tokens with [CLS] and [SEP]
    assert choose_max_length(tokenizer, [short] * 95 + [long] * 5) == 8
    assert choose_max_length(tokenizer, [short] * 94 + [long] * 6) == 16
    assert choose_max_length(tokenizer, ["film " * 60], limit=32) == 32
    assert choose_max_length(tokenizer, [""]) == 8
    assert choose_max_length(tokenizer, [short] * 9 + ["film " * 39]) == 48  # nine of ten are not 95 %: a whole text, no interpolation
    fitted = Preprocessor.from_model_folder(bert_folder, BERT).fitted([short] * 99 + [long])
    assert fitted.settings.max_length == 8
    assert fitted([long])["input_ids"].shape == (1, 8)
    assert fitted.fitted([long]) is fitted


def test_roberta_has_fewer_positions(bert_folder: Path) -> None:
    roberta = {**BERT, "model_type": "roberta", "max_position_embeddings": 34, "pad_token_id": 0}
    assert Preprocessor.from_model_folder(bert_folder, roberta).settings.length_limit == 33
    with pytest.raises(ModelError, match="at most 33 tokens: 34"):
        Preprocessor.from_model_folder(bert_folder, roberta, max_length=34)


def test_text_folders_that_cannot_be_used(bert_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        Preprocessor.from_model_folder(tmp_path, BERT)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"damaged tokenizer\.json"):
        Preprocessor.from_model_folder(tmp_path, BERT)
    body = json.loads((bert_folder / "tokenizer.json").read_text())
    body["model"]["vocab"] = {t.replace("[PAD]", "[NIL]"): i for t, i in body["model"]["vocab"].items()}
    body["added_tokens"] = [t for t in body["added_tokens"] if t["content"] != "[PAD]"]
    body["padding"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(body))
    with pytest.raises(ModelError, match="no padding token"):
        Preprocessor.from_model_folder(tmp_path, {**BERT, "pad_token_id": None})
    with pytest.raises(ModelError, match="cannot tell what the model reads"):
        Preprocessor.from_model_folder(tmp_path, {"model_type": "whisper"})
    with pytest.raises(RecordError, match="no such file"):
        Preprocessor.from_folder(tmp_path)
    with pytest.raises(ModelError, match="no maximum length"):
        Preprocessor.from_model_folder(bert_folder, BERT)(["film"])


@pytest.mark.parametrize("raw", [None, 3, ("a", None), ("a", "b", "c"), b"bytes"])
def test_what_is_no_text_is_refused(bert_folder: Path, raw: object) -> None:
    with pytest.raises(DataError, match="not a text"):
        Preprocessor.from_model_folder(bert_folder, BERT, max_length=8)([raw])


# ------------------------------------------------------------------------------------------------ images


@pytest.mark.parametrize("resample", [0, 2, 3])
def test_images_are_resized_and_normalised_as_transformers_does(tmp_path: Path, resample: int) -> None:
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    described = {"size": {"height": 12, "width": 10}, "resample": resample, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25]}
    images = [noise(21, 17, 1), noise(12, 10, 2), noise(5, 40, 3)]
    got = Preprocessor.from_model_folder(vit_folder(tmp_path, **described), VIT)(images)["pixel_values"]
    want = ViTImageProcessorPil(**described)(images, return_tensors="np")["pixel_values"]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, atol=2e-6)  # a few float32 steps of values up to 3


def test_pixels_by_hand(tmp_path: Path) -> None:
    folder = vit_folder(tmp_path, size={"height": 12, "width": 10}, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.4, 0.3])
    image = noise(12, 10)
    stored = Preprocessor.from_model_folder(folder, VIT).encode([image])["pixel_values"]
    assert stored.dtype == np.uint8
    assert np.array_equal(stored[0], np.asarray(image).transpose(2, 0, 1))
    got = Preprocessor.from_model_folder(folder, VIT)([image])["pixel_values"][0]
    want = np.asarray(image, np.float64) / 255
    want = ((want - [0.1, 0.2, 0.3]) / [0.5, 0.4, 0.3]).transpose(2, 0, 1)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_shorter_edge_and_centre_crop_as_transformers_does(tmp_path: Path) -> None:
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    described = {"size": {"shortest_edge": 14}, "do_center_crop": True, "crop_size": {"height": 12, "width": 10}, "resample": 3}
    folder = vit_folder(tmp_path, **described)
    for image in (noise(31, 17), noise(17, 31), noise(14, 14)):
        got = Preprocessor.from_model_folder(folder, VIT)([image])["pixel_values"]
        want = ViTImageProcessorPil(**described)([image], return_tensors="np")["pixel_values"]
        np.testing.assert_allclose(got, want, atol=2e-6)


def test_every_way_to_give_an_image_is_the_same_image(tmp_path: Path) -> None:
    image = noise(12, 10)
    array = np.asarray(image)
    path = tmp_path / "image.png"
    path.write_bytes(encoded(image))
    scaled = (array / np.float32(255)).transpose(2, 0, 1)
    ways = [image, array, array.transpose(2, 0, 1), scaled, path, str(path), path.read_bytes(), {"bytes": path.read_bytes(), "path": None}]
    p = Preprocessor.from_model_folder(tmp_path, VIT)
    stored = p.encode(ways)["pixel_values"]
    assert (stored == stored[0]).all()
    assert len({p.content_digest(p.canonical(way)) for way in ways}) == 1
    changed = array.copy()
    changed[3, 4, 1] ^= 1
    assert p.content_digest(p.canonical(changed)) != p.content_digest(p.canonical(image))


def test_grey_models_and_grey_images(tmp_path: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    config = {**VIT, "image_size": 28, "num_channels": 1}
    folder = vit_folder(tmp_path, size={"height": 28, "width": 28}, image_mean=[0.2855], image_std=[0.3528])
    got = Preprocessor.from_model_folder(folder, config)([grey, Image.fromarray(grey)])["pixel_values"]
    assert got.shape == (2, 1, 28, 28)
    np.testing.assert_allclose(got[0, 0], (grey / 255 - 0.2855) / 0.3528, atol=1e-6)
    colour = Preprocessor.from_model_folder(tmp_path / "none", {**VIT, "image_size": 28}).encode([grey])["pixel_values"]
    assert (colour[0] == grey).all()


def test_defaults_without_a_preprocessor_config_open_in_transformers(tmp_path: Path) -> None:
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    p = Preprocessor.from_model_folder(tmp_path, VIT)
    (tmp_path / "preprocessor_config.json").write_bytes(p.files()["preprocessor_config.json"])
    want = ViTImageProcessorPil.from_pretrained(tmp_path)([noise()], return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(p([noise()])["pixel_values"], want, atol=2e-6)
    assert Preprocessor.from_model_folder(tmp_path, VIT).settings == p.settings


def test_a_photo_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    image = noise(10, 12)
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by 90°
    image.save(buffer, "PNG", exif=exif)
    got = Preprocessor.from_model_folder(tmp_path, VIT).encode([buffer.getvalue()])["pixel_values"][0]
    assert np.array_equal(got, np.rot90(np.asarray(image), -1).transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"GIF89a, not really", "cannot read image: 18 bytes"),
        (Path("no/such.png"), r"cannot read image: no.such\.png"),
        (encoded(noise(400, 400))[:2000], "cannot read image: 2000 bytes"),
        (np.full((4, 4), 300, np.int32), "must be uint8, 0 to 255: int32"),
        (np.random.default_rng(0).normal(size=(4, 4, 3)), "must be uint8, 0 to 255: float64"),
        (np.full((4, 4), 0.3501), "must be uint8, 0 to 255: float64"),
        (np.zeros((2, 4, 4, 3), np.uint8), "shape"),
        (Image.new("I;16", (4, 4)), r"more than 8 bits per channel .* I;16"),
        (7, "not an image: 7"),
    ],
)
def test_what_is_no_image_is_refused(tmp_path: Path, raw: object, says: str) -> None:
    with pytest.raises(DataError, match=says) as caught:
        Preprocessor.from_model_folder(tmp_path, VIT)([raw])
    assert caught.value.hint


@pytest.mark.parametrize(
    ("described", "says"),
    [
        ({"size": {"height": 12, "width": 12}}, r"images of \(12, 12\), the model takes \(12, 10\)"),
        ({"size": {"shortest_edge": 12}}, "no fixed size"),
        ({"size": {"height": 12, "width": 10}, "image_mean": [0.1, 0.2]}, "image_mean has 2 values for 3 channels"),
    ],
)
def test_image_settings_that_contradict_the_model_are_refused(tmp_path: Path, described: dict, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        Preprocessor.from_model_folder(vit_folder(tmp_path, **described), VIT)


# ------------------------------------------------------------------------------------------------ vectors, imports


def test_vectors(tmp_path: Path) -> None:
    p = Preprocessor.from_model_folder(tmp_path, {"model_type": "nascompile-toy", "features": 3}, inputs=["features"])
    got = p([[1, 2, 3], ["4", "5.5", "6"]])["features"]
    assert got.dtype == np.float32
    assert got.tolist() == [[1, 2, 3], [4, 5.5, 6]]
    bad = {"vectors of 3 numbers": [1, 2], "not a vector of numbers": [1, 2, "x"], "no finite number": [1, 2, float("nan")]}
    for says, raw in bad.items():
        with pytest.raises(DataError, match=says):
            p([raw])


def test_neither_torch_nor_transformers_is_imported(bert_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    for name, content in Preprocessor.from_model_folder(bert_folder, BERT, max_length=8).files().items():
        (tmp_path / "engine" / name).write_bytes(content)
    code = (
        "import sys; from nascompile.preprocess import Preprocessor; import nascompile.data\n"
        f"assert Preprocessor.from_folder({str(tmp_path / 'engine')!r})(['good film'])['input_ids'].shape == (1, 8)\n"
        "print([m for m in ('torch', 'transformers', 'datasets', 'pandas', 'pyarrow') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"

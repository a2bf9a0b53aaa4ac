"""Reading, checking, deduplicating and splitting labelled data; test stays shut until a choice is written."""

from __future__ import annotations

import csv
import errno
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image
from sklearn.utils.class_weight import compute_class_weight

from nascompile import data, records
from nascompile.data import SPLITS, DataManifest, DataSettings, open_split, prepare
from nascompile.data_sources import Columns, read
from nascompile.errors import DataError, NascompileError, RecordError
from nascompile.preprocess import Preprocessing, Preprocessor
from nascompile.records import Choice
from nascompile.tasks.classification import PLUGIN as CLASSIFICATION
from nascompile.tasks.regression import PLUGIN as REGRESSION

CHOICE = Choice(engine="candidate-1", reason="fastest within the budget", budgets=(), ranking=("candidate-1",))
VECTORS = Preprocessor(Preprocessing(modality="vector", inputs=("features",), features=2), {})
IMAGES = Preprocessor(
    Preprocessing(modality="image", inputs=("pixel_values",), channels=1, resize=(6, 6), mean=(0.5,), std=(0.25,)),
    {},
)


@pytest.fixture(scope="module")
def texts() -> Preprocessor:
    """One token per word w0 … w499; no length chosen yet."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, **{f"w{i}": i + 2 for i in range(500)}}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    preprocessing = Preprocessing(modality="text", inputs=("input_ids", "attention_mask"), length_limit=64)
    return Preprocessor(preprocessing, {"tokenizer.json": tokenizer.to_str().encode()})


def sentences(n: int, classes: Sequence[str] = ("neg", "pos"), start: int = 0) -> list[tuple[str, str]]:
    return [(f"w{i} w{i % 7}", classes[i % len(classes)]) for i in range(start, start + n)]


def write_csv(path: Path, rows: Sequence[Sequence[Any]], header: Sequence[str] = ("text", "label"), delimiter: str = ",") -> str:
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, delimiter=delimiter).writerows([header, *rows])
    return str(path)


def ids_of(folder: Path, name: str) -> set[bytes]:
    return {row.tobytes() for row in np.load(folder / name / "ids.npy")}


def read_test(folder: Path, choice: Choice = CHOICE) -> data.Split:
    records.save(choice, folder.parent / "choice.json")
    return open_split(folder, "test", "final scores")


def labelled(split: data.Split) -> Counter[tuple[bytes, int]]:
    return Counter((i.tobytes(), int(label)) for i, label in zip(split.ids, split.labels, strict=True))


# ------------------------------------------------------------------------------------------------ splits


@given(
    st.integers(0, 1000),
    st.lists(st.integers(8, 60), min_size=2, max_size=5),
    st.floats(0.1, 0.3),
    st.floats(0.1, 0.3),
    st.integers(0, 20),
)
@settings(max_examples=25, deadline=None)
def test_splits_are_disjoint_complete_and_stratified(
    tmp_path_factory: pytest.TempPathFactory, seed: int, counts: list[int], test: float, validation: float, repeats: int
) -> None:
    rows = [([float(c), float(i)], f"class {c}") for c, n in enumerate(counts) for i in range(n)]
    n = len(rows)
    folder = tmp_path_factory.mktemp("run") / "data"
    chosen = DataSettings(seed=seed, test_size=test, validation_size=validation)
    manifest = prepare(chosen, VECTORS, CLASSIFICATION, folder, sources={"train": rows + rows[:repeats]})
    stored = {name: (read_test(folder) if name == "test" else open_split(folder, name)) for name in SPLITS}
    found = Counter((*map(float, x), int(y)) for s in stored.values() for x, y in zip(s.arrays()["features"], s.labels, strict=True))
    assert found == Counter((*x, int(y[-1])) for x, y in rows)  # every sample once, with its own label
    assert (len(stored["test"]), len(stored["validation"])) == (round(test * n), round(validation * n))
    assert manifest.split("train").duplicates == repeats
    for name, share in (("test", test), ("validation", validation)):
        for c, count in enumerate(counts):
            # Largest remainders move a quota by less than one; keeping a sample of a rare class back by at most one more.
            assert abs((stored[name].labels == c).sum() - share * count) < 2
    assert len(stored["calibration"]) == (n - len(stored["test"]) - len(stored["validation"])) // 4
    for name, split in stored.items():
        assert set(split.labels) >= set(range(len(counts))) or name == "calibration"
        assert dict(manifest.split(name).class_counts) == {f"class {c}": int((split.labels == c).sum()) for c in range(len(counts))}


def test_splits_depend_on_the_seed_and_not_on_the_order_of_rows(tmp_path: Path) -> None:
    rows = [([float(i), 0.0], "ab"[i % 2]) for i in range(200)]
    digests = []
    for k, (given_rows, seed) in enumerate([(rows, 0), (rows[::-1], 0), (rows, 1)]):
        manifest = prepare(DataSettings(seed=seed), VECTORS, CLASSIFICATION, tmp_path / str(k) / "data", sources={"train": given_rows})
        digests.append([info.digest for info in manifest.splits])
    assert digests[0] == digests[1]
    assert not set(digests[0]) & set(digests[2])


def test_given_splits_claim_their_samples_before_train(tmp_path: Path, texts: Preprocessor) -> None:
    rows = sentences(40)
    validation, test = sentences(8, start=30), sentences(6, start=36)
    parts = {"train": rows, "validation": validation, "test": test}
    paths = {name: write_csv(tmp_path / f"{name}.csv", part) for name, part in parts.items()}
    chosen = DataSettings(data=paths["train"], validation=paths["validation"], test=paths["test"], calibration_size=5)
    folder = tmp_path / "data"
    manifest = prepare(chosen, texts, CLASSIFICATION, folder)
    sizes = {info.name: (info.samples, info.duplicates) for info in manifest.splits}
    # validation 30…37 loses 36, 37 to test 36…41; train 0…39 loses 30…39 to both.
    assert sizes == {"train": (25, 10), "calibration": (5, 0), "validation": (6, 2), "test": (6, 0)}
    every = [ids_of(folder, name) for name in SPLITS]
    assert len(set().union(*every)) == sum(map(len, every)) == 42


def test_a_given_calibration_is_kept_out_of_train(tmp_path: Path, texts: Preprocessor) -> None:
    sources = {"train": sentences(60), "calibration": sentences(10)}
    manifest = prepare(DataSettings(), texts, CLASSIFICATION, tmp_path / "data", sources=sources)
    assert {i.name: (i.samples, i.duplicates) for i in manifest.splits}["calibration"] == (10, 0)
    assert manifest.split("train").duplicates == 10
    assert not ids_of(tmp_path / "data", "train") & ids_of(tmp_path / "data", "calibration")


def test_contradictions_are_dropped_and_counted(tmp_path: Path, texts: Preprocessor) -> None:
    rows = [*sentences(40), ("  w0 w0 ", "pos"), ("w1 w1", "pos")]  # the first contradicts row 1, the second repeats row 2
    manifest = prepare(DataSettings(), texts, CLASSIFICATION, tmp_path / "data", sources={"train": rows})
    train = manifest.split("train")
    assert (train.conflicts, train.duplicates) == (2, 1)
    assert sum(info.samples for info in manifest.splits) == 39
    lost = texts.content_digest("w0 w0")
    assert all(lost not in ids_of(tmp_path / "data", name) for name in SPLITS)


def test_what_contradicts_itself_in_test_is_no_truth_for_train_either(tmp_path: Path, texts: Preprocessor) -> None:
    sources = {"train": sentences(40), "test": [*sentences(4, start=50), ("w0 w0", "neg"), ("w0 w0", "pos")]}
    manifest = prepare(DataSettings(), texts, CLASSIFICATION, tmp_path / "data", sources=sources)
    assert (manifest.split("test").samples, manifest.split("test").conflicts) == (4, 2)
    assert manifest.split("train").duplicates == 1
    assert all(texts.content_digest("w0 w0") not in ids_of(tmp_path / "data", name) for name in SPLITS)


def test_rare_classes_reach_train_validation_and_test(tmp_path: Path) -> None:
    rows = [([float(c), float(i)], c) for c in range(21) for i in range(200 if c == 0 else 3)]
    manifest = prepare(DataSettings(), VECTORS, CLASSIFICATION, tmp_path / "data", sources={"train": rows})
    for name in ("train", "validation", "test"):
        assert min(count for _, count in manifest.split(name).class_counts) == 1
    assert [manifest.split(name).samples for name in ("validation", "test")] == [52, 52]


def test_images_are_compared_by_their_pixels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    folder = tmp_path / "pictures"
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(10):
            Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / name / f"{i}.png")
    Image.open(folder / "cat" / "0.png").save(folder / "cat" / "again.bmp")
    manifest = prepare(DataSettings(data=str(folder)), IMAGES, CLASSIFICATION, tmp_path / "run" / "data")
    assert manifest.label_names == ("cat", "dog")
    assert manifest.split("train").duplicates == 1
    split = open_split(tmp_path / "run" / "data", "train")
    assert split.inputs["pixel_values"].dtype == np.uint8
    pixels, labels = next(split.batches(3))
    np.testing.assert_allclose(pixels["pixel_values"], (split.inputs["pixel_values"][:3] / 255 - 0.5) / 0.25, atol=1e-6)
    assert labels.tolist() == split.labels[:3].tolist()


def test_regression_splits_cover_the_range(tmp_path: Path) -> None:
    rows = [([float(i), 1.0], i / 10) for i in range(300)]
    manifest = prepare(DataSettings(), VECTORS, REGRESSION, tmp_path / "data", sources={"train": rows})
    assert manifest.label_names == ()
    labels = open_split(tmp_path / "data", "validation").labels
    assert labels.dtype == np.float32
    # A tenth of the values per tenth of the range, give or take the rounding of one quota.
    assert (np.abs(np.histogram(labels, bins=10, range=(0, 30))[0] - len(labels) / 10) <= 1).all()


# ------------------------------------------------------------------------------------------------ test is shut


def test_test_is_shut_until_a_valid_choice_is_written(tmp_path: Path, texts: Preprocessor) -> None:
    folder = tmp_path / "run" / "data"
    prepare(DataSettings(), texts, CLASSIFICATION, folder, sources={"train": sentences(60)})
    with pytest.raises(DataError, match="read too early") as caught:
        open_split(folder, "test")
    assert caught.value.hint
    for content in ("", "{}", "null", json.dumps({"record": "Choice", "version": 1, "data": {"engine": "x"}})):
        (folder.parent / "choice.json").write_text(content)
        with pytest.raises(DataError, match="without a valid choice"):
            open_split(folder, "test")
    assert data.accesses(folder) == []
    split = read_test(folder)
    assert len(split) == 12
    assert [(a["split"], a["purpose"]) for a in data.accesses(folder)] == [("test", "final scores")]
    read_test(folder)  # a killed report may read it again for the same choice
    with pytest.raises(DataError, match="already read for another choice"):
        read_test(folder, Choice(engine="baseline", reason="a second thought", budgets=(), ranking=()))


def test_stored_test_is_taken_for_data_by_no_loader(tmp_path: Path, texts: Preprocessor) -> None:
    folder = tmp_path / "data"
    prepare(DataSettings(), texts, CLASSIFICATION, folder, sources={"train": sentences(60)})
    sealed = sorted(path.name for path in (folder / "test").iterdir())
    assert sealed == ["attention_mask.sealed", "ids.npy", "input_ids.sealed", "labels.sealed"]
    for path in (folder / "test").glob("*.sealed"):
        with pytest.raises(ValueError, match="pickle"):
            np.load(path)
    split = read_test(folder)
    assert {row.tobytes() for row in split.ids} == ids_of(folder, "test")
    words = {f"w{i} w{i % 7}": ("neg", "pos")[i % 2] for i in range(60)}
    want = Counter((texts.content_digest(text), ("neg", "pos").index(label)) for text, label in words.items())
    assert not labelled(split) - want
    vocabulary = {i + 2: f"w{i}" for i in range(500)}
    for row, identity in zip(split.arrays()["input_ids"], split.ids, strict=True):
        text = " ".join(vocabulary[int(token)] for token in row if token)
        assert texts.content_digest(text) == identity.tobytes()


def test_data_cannot_change_once_test_has_been_read(tmp_path: Path, texts: Preprocessor) -> None:
    folder = tmp_path / "data"
    again = {"train": sentences(60)}
    prepare(DataSettings(), texts, CLASSIFICATION, folder, sources=again)
    open_split(folder, "train", "look")
    prepare(DataSettings(seed=5), texts, CLASSIFICATION, folder, sources=again)  # still free to change, the log is kept
    assert [a["purpose"] for a in data.accesses(folder)] == ["look"]
    read_test(folder)
    before = data.load_manifest(folder)
    prepare(DataSettings(seed=5), texts, CLASSIFICATION, folder, sources=again)
    with pytest.raises(DataError, match="cannot change any more"):
        prepare(DataSettings(seed=6), texts, CLASSIFICATION, folder, sources=again)
    assert data.load_manifest(folder) == before
    assert len(data.accesses(folder)) == 2


def test_a_split_that_another_process_opened_is_read_without_a_word(tmp_path: Path, texts: Preprocessor) -> None:
    folder = tmp_path / "run" / "data"
    prepare(DataSettings(), texts, CLASSIFICATION, folder, sources={"train": sentences(60)})
    with pytest.raises(DataError, match="no other process has opened this split: train"):
        data.opened_split(folder, "train")
    opened = open_split(folder, "train", "fine-tuning")
    found = data.opened_split(folder, "train")
    assert (found.digest, len(found)) == (opened.digest, len(opened))
    assert np.array_equal(found.labels, opened.labels)
    read_test(folder)
    with pytest.raises(DataError, match="no other process has opened this split: test"):
        data.opened_split(folder, "test")
    assert [a["split"] for a in data.accesses(folder)] == ["train", "test"]


def test_access_log_survives_a_torn_line_and_refuses_a_damaged_one(tmp_path: Path, texts: Preprocessor) -> None:
    folder = tmp_path / "data"
    prepare(DataSettings(), texts, CLASSIFICATION, folder, sources={"train": sentences(60)})
    open_split(folder, "train", "first")
    log = folder / "access.jsonl"
    log.write_bytes(log.read_bytes() + b'{"split":"te')
    assert [a["purpose"] for a in data.accesses(folder)] == ["first"]
    open_split(folder, "validation", "second")
    assert [a["purpose"] for a in data.accesses(folder)] == ["first", "second"]
    log.write_bytes(b"garbage\n" + log.read_bytes())
    with pytest.raises(DataError, match="damaged line 1"):
        read_test(folder)


# ------------------------------------------------------------------------------------------------ storing


def test_nothing_is_left_behind_by_a_full_disk(tmp_path: Path, texts: Preprocessor, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "data"
    prepare(DataSettings(), texts, CLASSIFICATION, folder, sources={"train": sentences(60)})
    before = data.load_manifest(folder)

    def full(self: object, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(data._Writer, "_put", full)
    with pytest.raises(RecordError, match="no space left"):
        prepare(DataSettings(seed=1), texts, CLASSIFICATION, folder, sources={"train": sentences(60)})
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert data.load_manifest(folder) == before
    assert len(open_split(folder, "train")) == before.split("train").samples


def test_unprepared_or_damaged_data_is_reported(tmp_path: Path, texts: Preprocessor) -> None:
    with pytest.raises(RecordError, match="no such file"):
        open_split(tmp_path / "data", "train")
    prepare(DataSettings(), texts, CLASSIFICATION, tmp_path / "data", sources={"train": sentences(60)})
    with pytest.raises(DataError, match="unknown split: tset"):
        open_split(tmp_path / "data", "tset")
    labels = tmp_path / "data" / "train" / "labels.npy"
    labels.write_bytes(labels.read_bytes()[:-8])
    with pytest.raises(DataError, match="damaged split"):
        open_split(tmp_path / "data", "train")


def test_maximum_length_comes_from_the_training_texts(tmp_path: Path, texts: Preprocessor) -> None:
    rows = [(f"w{i} " + "w1 " * 10, "ab"[i % 2]) for i in range(100)]
    longer = [(f"w{i} " + "w1 " * 40, "ab"[i % 2]) for i in range(100, 110)]
    sources = {"train": rows, "validation": longer}
    manifest = prepare(DataSettings(), texts, CLASSIFICATION, tmp_path / "data", sources=sources)
    assert manifest.max_length == 16
    assert [manifest.split(name).truncated for name in SPLITS] == [0, 0, 10, 0]
    assert open_split(tmp_path / "data", "validation").inputs["input_ids"].shape == (10, 16)
    assert Preprocessor.from_folder(tmp_path).settings.max_length == 16
    manifest = prepare(DataSettings(max_length=24), texts, CLASSIFICATION, tmp_path / "data", sources=sources)
    assert manifest.max_length == 24
    with pytest.raises(NascompileError, match="at most 64 tokens: 65"):
        prepare(DataSettings(max_length=65), texts, CLASSIFICATION, tmp_path / "data", sources=sources)


def test_batches_cover_an_epoch_and_resume_in_the_middle(tmp_path: Path, texts: Preprocessor) -> None:
    prepare(DataSettings(calibration_size=3), texts, CLASSIFICATION, tmp_path / "data", sources={"train": sentences(60)})
    split = open_split(tmp_path / "data", "train")
    plain = list(split.batches(8))
    assert [len(labels) for _, labels in plain] == [8, 8, 8, 8, 1]
    assert np.concatenate([x["input_ids"] for x, _ in plain]).tolist() == split.arrays()["input_ids"].tolist()
    assert plain[0][0]["input_ids"].dtype == plain[0][1].dtype == np.int64
    first = [x["input_ids"].tolist() for x, _ in split.batches(8, seed=1)]
    assert first == [x["input_ids"].tolist() for x, _ in split.batches(8, seed=1)]
    assert first[2:] == [x["input_ids"].tolist() for x, _ in split.batches(8, seed=1, start=2)]
    assert first != [x["input_ids"].tolist() for x, _ in split.batches(8, seed=1, epoch=1)]
    assert sorted(row for batch in first for row in batch) == sorted(split.arrays()["input_ids"].tolist())
    assert [len(y) for _, y in split.batches(8, seed=1, drop_last=True)] == [8, 8, 8, 8]
    part = split.take([5, 2])
    assert part.ids.tolist() == split.ids[[5, 2]].tolist()
    assert part.arrays()["input_ids"].tolist() == split.arrays()["input_ids"][[5, 2]].tolist()
    assert len({split.digest, part.digest, split.take([2, 5]).digest}) == 3


def test_class_weights_are_scikit_learns_balanced_ones() -> None:
    labels = np.array([0] * 7 + [2] * 2 + [3])
    got = data.class_weights(labels, 4)
    assert got.dtype == np.float32
    assert got[1] == 0
    assert got[[0, 2, 3]] == pytest.approx(compute_class_weight("balanced", classes=np.array([0, 2, 3]), y=labels))


# ------------------------------------------------------------------------------------------------ labels


@pytest.mark.parametrize(
    ("labels", "id2label", "names", "head"),
    [
        (("pos", "neg"), None, ("neg", "pos"), "new"),
        (("POS", "neg"), {0: "Pos", 1: "Neg"}, ("Pos", "Neg"), "kept"),
        ((0, 1), {0: "Pos", 1: "Neg"}, ("Pos", "Neg"), "kept"),
        (("0", "1"), {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}, ("LABEL_0", "LABEL_1", "LABEL_2"), "kept"),
        ((0, 5), {0: "Pos", 1: "Neg"}, ("0", "5"), "new"),
        (("good", "bad"), {0: "Pos", 1: "Neg"}, ("bad", "good"), "new"),
        ((2, 10), None, ("2", "10"), "new"),
    ],
)
def test_labels_follow_the_models_head_where_they_match_it(tmp_path, labels, id2label, names, head) -> None:
    rows = [([float(i), 0.0], labels[i % 2]) for i in range(40)]
    manifest = prepare(DataSettings(), VECTORS, CLASSIFICATION, tmp_path / "data", id2label=id2label, sources={"train": rows})
    assert (manifest.label_names, manifest.head) == (names, head)
    split = open_split(tmp_path / "data", "train")
    meant = {"pos": "Pos", "neg": "Neg", 0: names[0], 1: names[1]} if head == "kept" else {}
    if id2label:
        meant |= {"POS": "Pos", "neg": "Neg"}
    for x, y in zip(split.arrays()["features"], split.labels, strict=True):
        raw = labels[int(x[0]) % 2]
        if head == "new":
            assert names[y] == str(raw)
        elif isinstance(raw, str) and raw.isdecimal():
            assert y == int(raw)
        else:
            assert names[y] == meant[raw]


def test_class_labels_of_datasets_keep_their_order_and_name_an_anonymous_head(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["unhappy", "happy"])})
    rows = {"text": [f"w{i}" for i in range(40)], "label": [i % 2 for i in range(40)]}
    source = datasets.Dataset.from_dict(rows, features=features)
    samples = read(source, "text", Columns())["train"]
    assert samples.labels[:2] == ["unhappy", "happy"]
    assert data._label_names(samples, CLASSIFICATION, None) == (("unhappy", "happy"), "new")
    assert data._label_names(samples, CLASSIFICATION, {0: "LABEL_0", 1: "LABEL_1"}) == (("unhappy", "happy"), "kept")
    unlabelled = datasets.Dataset.from_dict({**rows, "label": [-1] * 40}, features=features)
    assert read(unlabelled, "text", Columns())["train"].labels[0] is None


# ------------------------------------------------------------------------------------------------ sources

ROWS = [('plain, with "quotes"', "a"), ("two\nlines", "b"), ("NA", "a"), ("été", "b")]


def as_csv(folder: Path) -> str:
    return write_csv(folder / "d.csv", ROWS)


def as_tsv(folder: Path) -> str:
    return write_csv(folder / "d.tsv", ROWS, delimiter="\t")


def as_jsonl(folder: Path) -> str:
    lines = [json.dumps({"text": x, "label": y}) for x, y in ROWS]
    (folder / "d.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return str(folder / "d.jsonl")


def as_parquet(folder: Path) -> str:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": [x for x, _ in ROWS], "label": [y for _, y in ROWS]}), folder / "d.parquet")
    return str(folder / "d.parquet")


def as_disk_dataset(folder: Path) -> str:
    import datasets

    rows = datasets.Dataset.from_dict({"text": [x for x, _ in ROWS], "label": [y for _, y in ROWS]})
    datasets.DatasetDict({"train": rows}).save_to_disk(str(folder / "d"))
    return str(folder / "d")


def as_frame(folder: Path) -> Any:
    import pandas

    return pandas.DataFrame({"text": [x for x, _ in ROWS], "label": [y for _, y in ROWS]})


def as_torch(folder: Path) -> Any:
    from torch.utils.data import Dataset

    class Rows(Dataset):
        def __len__(self) -> int:
            return len(ROWS)

        def __getitem__(self, index: int) -> tuple[str, str]:
            return ROWS[index]

    return Rows()


@pytest.mark.parametrize(
    "make",
    [as_csv, as_tsv, as_jsonl, as_parquet, as_disk_dataset, as_frame, as_torch, lambda _: ROWS, lambda _: tuple(zip(*ROWS, strict=True))],
)
def test_every_kind_of_source_gives_the_same_rows(make, tmp_path: Path) -> None:
    samples = read(make(tmp_path), "text", Columns())["train"]
    assert [(samples.inputs[i], samples.labels[i]) for i in range(len(samples))] == ROWS
    assert samples.where(1)


def test_pairs_named_columns_and_features(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "d.csv", [("x", "y", "u", "1"), ("p", "q", "v", "0")], ("premise", "hypothesis", "source", "gold"))
    samples = read(path, "text", Columns(label="gold"))["train"]
    assert [samples.inputs[i] for i in range(2)] == [("x", "y"), ("p", "q")]
    samples = read(path, "text", Columns(text=("source",), label="gold"))["train"]
    assert list(samples.inputs) == ["u", "v"]
    path = write_csv(tmp_path / "v.csv", [("1", "a", "2"), ("3", "b", "4")], ("one", "label", "two"))
    assert list(read(path, "vector", Columns())["train"].inputs) == [["1", "2"], ["3", "4"]]


def test_image_columns_of_paths_and_of_bytes(tmp_path: Path) -> None:
    import datasets

    (tmp_path / "images").mkdir()
    arrays = [np.full((6, 6), 40 * i, np.uint8) for i in range(3)]
    for i, array in enumerate(arrays):
        Image.fromarray(array).save(tmp_path / "images" / f"{i}.png")
    path = write_csv(tmp_path / "d.csv", [(f"images/{i}.png", "ab"[i % 2]) for i in range(3)], ("file", "label"))
    files = [str(tmp_path / "images" / f"{i}.png") for i in range(3)]
    dataset = datasets.Dataset.from_dict({"img": files, "label": [0, 1, 0]}).cast_column("img", datasets.Image())
    dataset.to_parquet(str(tmp_path / "d.parquet"))
    torch = pytest.importorskip("torch")
    tensors = [(torch.tensor(array)[None] / 255, torch.tensor(i % 2)) for i, array in enumerate(arrays)]
    for source in (path, dataset, str(tmp_path / "d.parquet"), tensors, (np.stack(arrays), np.array([0, 1, 0]))):
        samples = read(source, "image", Columns())["train"]
        pixels = IMAGES.encode([samples.inputs[i] for i in range(3)])["pixel_values"]
        assert np.array_equal(pixels[:, 0], np.stack(arrays))
        assert [str(label) in "a0" for label in samples.labels] == [True, False, True]


def test_a_source_may_hold_several_splits(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("L", (6, 6)).save(tmp_path / split / name / "1.png")
            (tmp_path / split / name / ".DS_Store").write_text("")
    found = read(str(tmp_path), "image", Columns())
    assert set(found) == {"train", "validation", "test"}
    assert all(list(samples.labels) == ["cat", "dog"] for samples in found.values())


@pytest.mark.parametrize(
    ("rows", "header", "options", "says"),
    [
        ([], ("text", "label"), {}, "no samples"),
        (sentences(20), ("text", "label"), {"label_column": "stars"}, r"no such column in .*d\.csv: stars"),
        (sentences(20), ("text", "label"), {"text_columns": ("body",)}, r"no such column in .*d\.csv: body"),
        ([("w1", "w2", "a")] * 20, ("text", "review", "label"), {}, "several columns could hold the texts: text, review"),
        ([("w1", "1", "a")] * 20, ("story", "no", "label"), {}, "no column looks like the texts"),
        ([("w1", "1", "a")] * 20, ("text", "score", "label"), {}, "several columns could hold the labels: score, label"),
        ([*sentences(20), ("w400", " ")], ("text", "label"), {}, r"no label in column `label` \(train\): d\.csv, row 22"),
        ([(f"w{i}", "a") for i in range(20)], ("text", "label"), {}, "at least two classes: found 1"),
        (sentences(4), ("text", "label"), {}, r"a class needs 3 different ones, neg \(2\), pos \(2\)"),
        (sentences(6), ("text", "label"), {}, "too few samples for four splits: 6 different ones, at least 7"),
        ([*sentences(40), ("w400", "odd")], ("text", "label"), {}, r"a class needs 3 different ones, odd \(1\)"),
        (sentences(40), ("text", "label"), {"test_size": 38}, "too few samples for four splits"),
        (sentences(40), ("text", "label"), {"validation_size": 0}, "validation cannot be empty"),
        (sentences(40), ("text", "text"), {}, "names a column twice"),
        ([*sentences(3), ("w1", "a", "b")], ("text", "label"), {}, r"row 5 has 3 fields instead of 2"),
        ([("w1 w1", "ab"[i % 2]) for i in range(40)], ("text", "label"), {}, "nothing is left of train: 0 duplicates, 40"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path: Path, texts: Preprocessor, rows, header, options, says: str) -> None:
    path = write_csv(tmp_path / "d.csv", rows, header)
    with pytest.raises(DataError, match=says) as caught:
        prepare(DataSettings(data=path, **options), texts, CLASSIFICATION, tmp_path / "run" / "data")
    assert caught.value.hint
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("d.csv", b"", "empty file"),
        ("d.jsonl", b"\n\n", "empty file"),
        ("d.jsonl", b'{"text": "a"}\n{"text": \n', r"line 2 is not JSON"),
        ("d.jsonl", b'["a", "b"]\n', "not a JSON object"),
        ("d.csv", b"text,label\n\xe9t\xe9,a\n", "not UTF-8"),
        ("d.csv", b'text,label\n"open,a\n', "not valid CSV"),
        ("d.parquet", b"not parquet", "cannot read as Parquet"),
        ("d.xlsx", b"PK", r"unknown type of data file: d\.xlsx"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says) as caught:
        read(str(tmp_path / name), "text", Columns())
    assert caught.value.hint


def test_labels_that_train_lacks_and_values_that_are_none(tmp_path: Path, texts: Preprocessor) -> None:
    other = [("w300", "neg"), ("w301", "odd")]
    with pytest.raises(DataError, match=r"a label of validation that train lacks: 'odd' \(.*item 1\)"):
        prepare(DataSettings(), texts, CLASSIFICATION, tmp_path / "data", sources={"train": sentences(40), "validation": other})
    path = write_csv(tmp_path / "d.csv", [(f"w{i}", i if i != 7 else "dear") for i in range(40)])
    with pytest.raises(DataError, match=r"column `label`, d\.csv, row 9: value 1 is not a number: 'dear'"):
        prepare(DataSettings(data=path), texts, REGRESSION, tmp_path / "data")
    path = write_csv(tmp_path / "v.csv", [("w400", "dear")])
    with pytest.raises(DataError, match=r"column `label`, v\.csv, row 2: value 1 is not a number: 'dear'"):
        prepare(DataSettings(validation=path), texts, REGRESSION, tmp_path / "data", sources={"train": [(f"w{i}", i) for i in range(40)]})


def test_image_folders_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="empty folder"):
        read(str(tmp_path), "image", Columns())
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(6):
            Image.new("L", (6, 6), i if name == "cat" else 100 + i).save(tmp_path / name / f"{i}.png")
    (tmp_path / "owl").mkdir()
    with pytest.raises(DataError, match=r"a class without images: .*owl"):
        read(str(tmp_path), "image", Columns())
    (tmp_path / "owl").rmdir()
    (tmp_path / "stray.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"outside the class folders has no label: .*stray"):
        read(str(tmp_path), "image", Columns())
    (tmp_path / "stray.png").rename(tmp_path / "dog" / "notes.txt")
    with pytest.raises(DataError, match=r"not a known type of image: .*notes"):
        read(str(tmp_path), "image", Columns())
    (tmp_path / "dog" / "notes.txt").rename(tmp_path / "dog" / "broken.png")
    with pytest.raises(DataError, match=r"dog.broken\.png: cannot read image"):
        prepare(DataSettings(data=str(tmp_path)), IMAGES, CLASSIFICATION, tmp_path / "run" / "data")


def test_missing_data_and_objects_of_an_unknown_kind(tmp_path: Path, texts: Preprocessor) -> None:
    for source, says in (
        (str(tmp_path / "none.csv"), "no such file or folder"),
        ("./none", "no such file or folder"),
        (object(), "data of an unknown kind: object"),
        ([1, 2, 3], "item 0 is not a pair"),
        (([1, 2], [1]), "2 inputs and 1 labels"),
        ({"train": ROWS, "holdout": ROWS}, "unknown splits in the given dict: holdout"),
        ({"val": ROWS, "dev": ROWS}, "two names of the same split"),
    ):
        with pytest.raises(DataError, match=says):
            read(source, "text", Columns())
    with pytest.raises(DataError, match="no training data"):
        prepare(DataSettings(), texts, CLASSIFICATION, tmp_path / "data")
    with pytest.raises(DataError, match="unknown split: holdout"):
        prepare(DataSettings(), texts, CLASSIFICATION, tmp_path / "data", sources={"train": ROWS, "holdout": ROWS})


def test_a_hub_name_goes_to_datasets_without_remote_code(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[Any, ...]] = []

    def load_dataset(*arguments: Any, **options: Any) -> Any:
        asked.append((*arguments, options))
        if arguments[0] == "none/such":
            raise ConnectionError("offline")
        return datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["w1"], "label": ["a"]})})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read("owner/name:small", "text", Columns())["train"].labels == ["a"]
    assert asked == [("owner/name", "small", {})]
    with pytest.raises(DataError, match="cannot load the data set: none/such") as caught:
        read("none/such", "text", Columns())
    assert "offline" in caught.value.detail


def test_manifest_is_read_back_and_progress_is_told(tmp_path: Path, texts: Preprocessor) -> None:
    told: list[tuple[str, int, int]] = []
    manifest = prepare(
        DataSettings(), texts, CLASSIFICATION, tmp_path / "data", sources={"train": sentences(60)}, progress=lambda *a: told.append(a)
    )
    assert records.load(tmp_path / "data" / "data.json", DataManifest) == manifest == data.load_manifest(tmp_path / "data")
    assert {what for what, done, total in told if done == total} >= {f"encoding {name}" for name in SPLITS}
    assert manifest.split("train").digest == open_split(tmp_path / "data", "train").digest

"""The tool that makes labelled images: splits that share no picture, copies on floors of their own split, nothing twice."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nascompile import data
from nascompile.data import DataSettings

TOOL = Path(__file__).parents[2] / "tools" / "make_image_data.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("make_image_data", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def archive(path: Path) -> str:
    """Floors, each of one colour, and monsters whose middle is of one; the archive's digest."""
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w:xz") as tar:
        for i in range(60):
            word = f"{'abcdefghij'[i % 10]}{'xyzuvw'[i // 10]}"
            for folder, name in (("dngn/floor", f"stone_{word}"), ("mon/animals", f"beast_{word}")):
                for frame in range(2):
                    pixels = np.zeros((32, 32, 4), np.uint8)
                    middle = slice(None) if folder.startswith("dngn") else slice(8, 24)
                    pixels[middle, middle] = (*rng.integers(0, 256, 3), 255)
                    buffer = io.BytesIO()
                    Image.fromarray(pixels).save(buffer, "PNG")
                    entry = tarfile.TarInfo(f"game/source/rltiles/{folder}/{name}{frame}.png")
                    entry.size = len(buffer.getvalue())
                    tar.addfile(entry, io.BytesIO(buffer.getvalue()))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_pictures_and_floors_of_a_split_are_in_no_other(tool, tmp_path, monkeypatch):
    path = tmp_path / "game.tar.xz"
    monkeypatch.setattr(tool, "SHA256", archive(path))
    found = tool.tiles(path, np.random.default_rng(0))
    colours = {split: {label: set() for label in ("floor", "monster")} for split in found}
    for split, rows in found.items():
        counts = Counter(label for _, label in rows)
        assert counts["monster"] > counts["floor"] > 3, "what is transparent is there on several floors"
        for image, label in rows:
            pixels = np.asarray(image)
            assert pixels.shape == (32, 32, 3)
            colours[split]["floor"].add(tuple(pixels[0, 0]))
            if label == "monster":
                colours[split]["monster"].add(tuple(pixels[16, 16]))
    for label in ("floor", "monster"):
        sets = [kinds[label] for kinds in colours.values()]
        assert all(not a & b for i, a in enumerate(sets) for b in sets[:i])
    assert {tool._split_of(f"mon/dog{i}.png") for i in range(9)} == {tool._split_of("mon/dog_old.png")}


def test_another_archive_is_refused(tool, tmp_path):
    (tmp_path / "other").write_bytes(b"nothing")
    with pytest.raises(SystemExit, match="is another archive"):
        tool.tiles(tmp_path / "other", np.random.default_rng(0))


def test_fashion_mnist_keeps_its_test_and_nothing_twice(tool, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    parts = {"train": rng.integers(0, 256, (400, 28, 28)), "t10k": rng.integers(0, 256, (50, 28, 28))}
    parts["train"][3] = parts["t10k"][7]
    parts["train"][5] = parts["train"][4]
    for name, images in parts.items():
        labels = np.arange(len(images)) % 10
        for kind, header, body in (("images-idx3", 16, images), ("labels-idx1", 8, labels)):
            (tmp_path / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(bytes(header) + body.astype(np.uint8).tobytes()))
    monkeypatch.setattr(tool, "VALIDATION", 100)
    monkeypatch.setattr(sys, "argv", ["make", "fashion", "--source", str(tmp_path), "--out", str(tmp_path / "out"), "--side", "32"])
    tool.main()
    files = {split: str(tmp_path / "out" / f"{split}.parquet") for split in ("train", "validation", "test")}
    settings = DataSettings(data=files["train"], validation=files["validation"], test=files["test"])
    assert data.image_shape(settings) == (32, 32, 1)
    import pyarrow.parquet as pq

    counts = {split: Counter(pq.read_table(path).column("label").to_pylist()) for split, path in files.items()}
    assert sum(counts["test"].values()) == 50
    assert sum(counts["train"].values()) + sum(counts["validation"].values()) == 400 - 2
    assert sum(counts["validation"].values()) >= 98
    assert set(counts["train"]) == set(tool.CLASSES)

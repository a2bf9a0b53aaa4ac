"""Make labelled images for vision transformers on microcontrollers: train.parquet, validation.parquet and test.parquet, with fixed splits.

    python tools/make_image_data.py fashion --source FOLDER --out fashion [--side 32]
    python tools/make_image_data.py tiles --source crawl_0.28.0.orig.tar.xz --out tiles

`fashion` is Fashion-MNIST (MIT licence, Copyright 2017 Zalando SE) as the Debian package `dataset-fashion-mnist` has it: FOLDER holds the
four *-ubyte.gz files. Grey, 10 classes, as they are (28 pixels) or scaled to `--side`; test is the official one.

`tiles` are the pictures of the game Dungeon Crawl Stone Soup (its LICENSE: most are CC0, the others in the public domain): colour, 32
pixels, 10 classes by the folder that the game's artists keep a picture in. The archive is that of Debian 12's source package `crawl`
(`apt-get source --download-only crawl`, which needs a deb-src line). What a picture leaves transparent shows a floor of the game, another
one in every copy: rare classes get more copies. Pictures that differ by a number in their name (frames, variants) are all in one split, and
so are floors.

An image that a split has already, or that a split before it has (test, validation, train), is left out.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
VALIDATION = 5000
"""Of Fashion-MNIST's training images, as many of each class."""
SHA256 = "5a6be168f8888b84bdb199184ca20bd8636f77ba7e9e0124ebee8850092f2f47"
"""Of the tiles' archive."""
SIDE = 32
"""Of a tile."""
FOLDERS = {
    "monster": r"(mon(?!/tentacles)|UNUSED/monsters|UNUSED/emissaries)/.*", "outfit": r"(player(?!/felids)|UNUSED/worn)/.*",
    "weapon": r"(item/weapon|UNUSED/weapons)/(?!brands/).*", "armour": r"(item/armour|UNUSED/armour)/(?!brands/).*",
    "trinket": r"item/(ring|amulet|potion|wand|staff|rod|scroll|book|gold|food|misc)/.*", "effect": r"effect/.*",
    "icon": r"gui/(spells|invocations|skills|abilities)/.*", "wall": r"dngn/wall/.*", "floor": r"dngn/floor/.*",
    "feature": r"dngn/(gateways|doors|altars|traps|statues|shops|vaults|trees)/.*",
}  # fmt: skip
"""Class ▸ paths of its pictures."""
TEST_SHARE, VALIDATION_SHARE = 0.2, 0.15
COPIES = {"train": (1200, 12), "validation": (150, 4), "test": (200, 4)}
"""Split ▸ images of a class that copies of its pictures are made up to, and the most copies of one picture."""

Row = tuple[Image.Image, str]


# ---------------------------------------------------------------------------------------------- Fashion-MNIST


def fashion(source: Path, side: int, rng: np.random.Generator) -> dict[str, list[Row]]:
    """Split ▸ images."""
    (images, labels), (test_images, test_labels) = (_part(source, part) for part in ("train", "t10k"))
    held = np.concatenate([rng.permutation(np.flatnonzero(labels == c))[: VALIDATION // len(CLASSES)] for c in range(len(CLASSES))])
    rest = np.setdiff1d(np.arange(len(labels)), held)

    def rows(pixels: np.ndarray, classes: np.ndarray) -> list[Row]:
        return [(_scaled(Image.fromarray(image), side), CLASSES[c]) for image, c in zip(pixels, classes, strict=True)]

    return {
        "test": rows(test_images, test_labels), "validation": rows(images[held], labels[held]),
        "train": rows(images[rest], labels[rest]),
    }  # fmt: skip


def _part(source: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 28, 28) and labels (n,) of an official part."""
    images, labels = (gzip.decompress((source / f"{part}-{kind}-ubyte.gz").read_bytes()) for kind in ("images-idx3", "labels-idx1"))
    return np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28), np.frombuffer(labels, np.uint8, offset=8)


def _scaled(image: Image.Image, side: int) -> Image.Image:
    return image if side == image.width else image.resize((side, side), Image.Resampling.BILINEAR)


# ---------------------------------------------------------------------------------------------- tiles


def tiles(source: Path, rng: np.random.Generator) -> dict[str, list[Row]]:
    """Split ▸ images: every picture as often as its class needs, each time on another floor of the split where it is transparent."""
    if (found := hashlib.sha256(source.read_bytes()).hexdigest()) != SHA256:
        raise SystemExit(f"{source} is another archive: SHA-256 {found} instead of {SHA256}")
    pictures: dict[str, dict[str, list[Image.Image]]] = {split: defaultdict(list) for split in COPIES}
    for path, picture in sorted(_pictures(source), key=lambda pair: pair[0]):
        for label, pattern in FOLDERS.items():
            if re.fullmatch(pattern, path):
                pictures[_split_of(path)][label].append(picture)
    return {split: list(_copies(found, *COPIES[split], rng)) for split, found in pictures.items()}


def _pictures(source: Path) -> Iterator[tuple[str, Image.Image]]:
    """(path within the tiles, picture of 32 x 32 with transparency); smaller or larger ones are fitted in."""
    with tarfile.open(source) as tar:
        for member in tar:
            _, found, path = member.name.partition("/rltiles/")
            if found and re.search(r"(^|/)[^./][^/]*\.png$", path) and (stream := tar.extractfile(member)):
                picture = Image.open(io.BytesIO(stream.read())).convert("RGBA")
                if max(picture.size) > 2 * SIDE:
                    continue  # a part of the screen, no tile
                picture.thumbnail((SIDE, SIDE))
                whole = Image.new("RGBA", (SIDE, SIDE))
                whole.paste(picture, ((SIDE - picture.width) // 2, SIDE - picture.height))
                yield path, whole


def _split_of(path: str) -> str:
    """By the name without its numbers."""
    key = re.sub(r"(_?(old|new))?[_\d]*\.png$", "", path)
    place = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64
    return "test" if place < TEST_SHARE else "validation" if place < TEST_SHARE + VALIDATION_SHARE else "train"


def _copies(pictures: dict[str, list[Image.Image]], wanted: int, most: int, rng: np.random.Generator) -> Iterator[Row]:
    floors = [floor for floor in pictures["floor"] if _opaque(floor)]
    for label, found in pictures.items():
        copies = int(np.clip(round(wanted / len(found)), 1, most))
        for picture in found:
            for _ in range(1 if _opaque(picture) else copies):
                ground = floors[int(rng.integers(len(floors)))].copy()
                ground.alpha_composite(picture)
                yield ground.convert("RGB"), label


def _opaque(picture: Image.Image) -> bool:
    return picture.getextrema()[3][0] == 255


# ---------------------------------------------------------------------------------------------- files


def unlike(splits: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """Without images that the split, or one before it, has already."""
    seen: set[bytes] = set()
    kept: dict[str, list[Row]] = {}
    for split, rows in splits.items():
        kept[split] = []
        for image, label in rows:
            if (key := hashlib.sha256(image.tobytes()).digest()) not in seen:
                seen.add(key)
                kept[split].append((image, label))
    return kept


def write(path: Path, rows: list[Row]) -> None:
    """One row an image: image = {bytes: PNG, path: null}, label = class name; as `datasets` and Hugging Face's viewer read them."""
    pictures, labels = [], []
    for image, label in rows:
        buffer = io.BytesIO()
        image.save(buffer, "PNG", optimize=True)
        pictures.append({"bytes": buffer.getvalue(), "path": None})
        labels.append(label)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features = {"image": {"_type": "Image"}, "label": {"dtype": "string", "_type": "Value"}}
    table = pa.table({"image": pa.array(pictures, kind), "label": pa.array(labels, pa.string())})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("fashion", "tiles"))
    parser.add_argument("--source", type=Path, required=True, help="folder of the four official files, or archive of the tiles")
    parser.add_argument("--side", type=int, default=28, help="pixels that Fashion-MNIST's images are scaled to")
    parser.add_argument("--seed", type=int, default=0, help="of validation, floors, and the order")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    make: Callable[[], dict[str, list[Row]]] = {
        "fashion": lambda: fashion(arguments.source, arguments.side, rng), "tiles": lambda: tiles(arguments.source, rng)
    }[arguments.what]  # fmt: skip
    order = ("test", "validation", "train")
    made = make()
    for split, rows in unlike({split: made[split] for split in order}).items():
        shuffled = [rows[i] for i in rng.permutation(len(rows))]
        write(arguments.out / f"{split}.parquet", shuffled)
        counts = dict(sorted(Counter(label for _, label in rows).items()))
        print(f"{split}: {len(rows):,} images, {len(made[split]) - len(rows)} left out; {counts}")


if __name__ == "__main__":
    main()

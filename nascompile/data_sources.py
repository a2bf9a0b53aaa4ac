"""Where labelled samples come from: files, image folders, `datasets`, objects in memory; all end as `Samples`."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nascompile.errors import DataError

FILE_TYPES = (".csv", ".tsv", ".jsonl", ".parquet")
IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
SPLIT_NAMES = {
    "train": "train", "training": "train", "calibration": "calibration",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation", "test": "test", "testing": "test",
}  # fmt: skip
TEXT_COLUMNS = ("text", "sentence", "review", "content", "comment", "document", "utterance", "headline", "snippet", "message")
PAIR_COLUMNS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("text1", "text2"))
IMAGE_COLUMNS = ("image", "img", "picture", "photo", "image_path", "file_name", "filename", "file", "path")
LABEL_COLUMNS = ("label", "labels", "target", "class", "category", "sentiment", "fine_label", "score", "rating", "y")


@dataclass(frozen=True)
class Columns:
    """Which columns the user named; empty where they are to be recognized by name."""

    text: tuple[str, ...] = ()
    image: str = ""
    label: str = ""


@dataclass(frozen=True)
class Samples:
    """Raw inputs and labels of one split, and how to name the i-th to a person."""

    source: str
    inputs: Sequence[Any]
    labels: Sequence[Any]
    where: Callable[[int], str]
    label_column: str = "label"
    label_names: tuple[str, ...] = ()
    """Class names in the order of their integer ids, where the source declares them; labels are names then."""

    def __len__(self) -> int:
        return len(self.labels)


class _Lazy(Sequence[Any]):
    """Elements computed when asked for, so that a large image set is never held decoded."""

    def __init__(self, length: int, element: Callable[[int], Any]) -> None:
        self._length, self._element = length, element

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._element(i) for i in range(*index.indices(self._length))]
        if not 0 <= index < self._length:
            raise IndexError(index)
        return self._element(index)


def read(source: Any, modality: str, columns: Columns) -> dict[str, Samples]:
    """Split name ▸ samples of one source: a path, a `datasets` name, or an object. A source without splits is all `train`."""
    found = _read_path(str(source), modality, columns) if isinstance(source, str | Path) else _read_object(source, modality, columns)
    for name, samples in found.items():
        if not len(samples):
            raise DataError(f"no samples in {samples.source} ({name}): 0 rows", hint="give a source with labelled samples")
    return found


def _read_path(source: str, modality: str, columns: Columns) -> dict[str, Samples]:
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix.lower() not in FILE_TYPES:
            raise DataError(f"unknown type of data file: {path.name}", hint=f"use one of {', '.join(FILE_TYPES)}, or a folder")
        return {"train": _table_samples(_read_file(path), modality, columns)}
    if path.is_dir():
        if any((path / name).exists() for name in ("dataset_dict.json", "state.json", "dataset_info.json")):
            import datasets

            return _read_object(datasets.load_from_disk(str(path)), modality, columns, str(path))
        return _read_image_folder(path)
    if path.suffix.lower() in FILE_TYPES or path.is_absolute() or source.startswith("."):
        raise DataError(f"no such file or folder: {source}", hint="check the path; a name without a suffix is looked up on the hub")
    return _read_hub(source, modality, columns)


def _read_hub(name: str, modality: str, columns: Columns) -> dict[str, Samples]:
    import datasets

    dataset, _, configuration = name.partition(":")
    try:
        loaded = datasets.load_dataset(dataset, configuration or None)
    except Exception as error:  # datasets raises many kinds; none of them is ours
        raise DataError(
            f"cannot load the data set: {name}",
            detail=f"{type(error).__name__}: {error}",
            hint="give a file, a folder, or a name on the hub (`name` or `name:configuration`) with the network reachable",
        ) from error
    return _read_object(loaded, modality, columns, name)


# ------------------------------------------------------------------------------------------------ files with columns


@dataclass(frozen=True)
class _Table:
    source: str
    columns: Mapping[str, Sequence[Any]]
    where: Callable[[int], str]
    folder: Path | None = None
    """What relative image paths start from."""
    label_names: tuple[tuple[str, tuple[str, ...]], ...] = ()


def _read_file(path: Path) -> _Table:
    suffix = path.suffix.lower()
    try:
        if suffix in (".csv", ".tsv"):
            columns, first = _read_csv(path, "," if suffix == ".csv" else "\t"), 2
        elif suffix == ".jsonl":
            columns, first = _read_jsonl(path), 1
        else:
            return _read_parquet(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name} is not UTF-8 text: byte {error.start}", hint="save it as UTF-8") from error
    return _Table(str(path), columns, lambda i: f"{path.name}, row {i + first}", path.parent)


def _read_csv(path: Path, delimiter: str) -> dict[str, list[Any]]:
    csv.field_size_limit(1 << 30)
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, delimiter=delimiter, strict=True)
        try:
            header = next(reader, None)
            if not header:
                raise DataError(f"empty file: {path}", hint="its first row must name the columns")
            if len(set(header)) < len(header):
                raise DataError(f"{path.name} names a column twice: {', '.join(header)}", hint="rename one of them")
            rows: list[list[str]] = []
            for number, row in enumerate(reader, start=2):
                if row and len(row) != len(header):
                    raise DataError(
                        f"{path.name}, row {number} has {len(row)} fields instead of {len(header)}",
                        hint="quote fields that hold the delimiter, a quote or a line break",
                    )
                # A blank line has no label; it is kept, so that it is reported as such with its row number.
                rows.append(row or [""] * len(header))
        except csv.Error as error:
            raise DataError(f"{path.name}, line {reader.line_num} is not valid CSV: {error}", hint="check its quotes") from error
    while rows and not any(rows[-1]):
        rows.pop()
    return {name: [row[i] for row in rows] for i, name in enumerate(header)}


def _read_jsonl(path: Path) -> dict[str, list[Any]]:
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            if rows:
                rows.append({})
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path.name}, line {number} is not JSON: {error}", hint="write one JSON object a line") from error
        if not isinstance(row, dict):
            raise DataError(f"{path.name}, line {number} is not a JSON object: {line[:60]}", hint="write one JSON object a line")
        rows.append(row)
    while rows and not rows[-1]:
        rows.pop()
    if not rows:
        raise DataError(f"empty file: {path}", hint="write one JSON object a line")
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: [row.get(name) for row in rows] for name in names}


def _read_parquet(path: Path) -> _Table:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"cannot read as Parquet: {path}", detail=str(error), hint="write the file again") from error
    columns = {name: _arrow_column(table.column(name)) for name in table.column_names}
    names = tuple(_huggingface_label_names(table.schema.metadata or {}))
    return _Table(str(path), columns, lambda i: f"{path.name}, row {i + 1}", path.parent, names)


def _arrow_column(column: Any) -> Sequence[Any]:
    return _Lazy(len(column), lambda i: column[i].as_py())


def _huggingface_label_names(metadata: Mapping[bytes, bytes]) -> Iterable[tuple[str, tuple[str, ...]]]:
    """Class names that `datasets` wrote into a Parquet file's metadata."""
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    for name, feature in features.items():
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names"):
            yield name, tuple(feature["names"])


def _table_samples(table: _Table, modality: str, columns: Columns) -> Samples:
    label = _label_column(table, columns.label)
    names = dict(table.label_names).get(label, ())
    samples = Samples(table.source, _inputs(table, modality, columns, label), table.columns[label], table.where, label)
    return _named(samples, names)


def _label_column(table: _Table, wanted: str) -> str:
    if wanted:
        _require(table, wanted, "--label-column")
        return wanted
    return _recognize(table, LABEL_COLUMNS, list(table.columns), "labels", "--label-column")


def _inputs(table: _Table, modality: str, columns: Columns, label: str) -> Sequence[Any]:
    others = [name for name in table.columns if name != label]
    if modality == "vector":
        values = [table.columns[name] for name in others]
        return _Lazy(len(table.columns[label]), lambda i: [value[i] for value in values])
    if modality == "image":
        name = columns.image or _recognize(table, IMAGE_COLUMNS, others, "images", "--image-column")
        _require(table, name, "--image-column")
        return _Lazy(len(table.columns[name]), lambda i: _image_value(table.columns[name][i], table.folder))
    chosen = columns.text
    if len(chosen) > 2:
        raise DataError(f"at most two text columns can be read together: {', '.join(chosen)}", hint="name one or two")
    for name in chosen:
        _require(table, name, "--text-column")
    if not chosen:
        lower = {name.lower(): name for name in others}
        pairs = [tuple(lower[name] for name in pair) for pair in PAIR_COLUMNS if all(name in lower for name in pair)]
        chosen = pairs[0] if len(pairs) == 1 else (_recognize(table, TEXT_COLUMNS, others, "texts", "--text-column"),)
    values = [table.columns[name] for name in chosen]
    return values[0] if len(values) == 1 else _Lazy(len(values[0]), lambda i: (values[0][i], values[1][i]))


def _image_value(value: Any, folder: Path | None) -> Any:
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    return folder / value if isinstance(value, str) and folder is not None else value


def _require(table: _Table, name: str, option: str) -> None:
    if name not in table.columns:
        raise DataError(f"no such column in {table.source}: {name}", hint=f"{option} must be one of: {', '.join(table.columns)}")


def _recognize(table: _Table, known: Sequence[str], among: Sequence[str], what: str, option: str) -> str:
    """The one column of `among` with a known name, or the only one there is; DataError listing the columns otherwise."""
    found = [name for name in among if name.lower() in known]
    if len(found) == 1:
        return found[0]
    if not found and len(among) == 1 and len(table.columns) == 2:
        return among[0]
    problem = f"several columns could hold the {what}: {', '.join(found)}" if found else f"no column looks like the {what}"
    raise DataError(f"{problem} in {table.source}", detail=f"columns: {', '.join(table.columns)}", hint=f"name it with {option}")


def _named(samples: Samples, names: tuple[str, ...]) -> Samples:
    """Integer ids replaced by the names that the source declares; -1 (how `datasets` marks a sample without label) by None."""
    if not names:
        return samples
    labels: list[Any] = []
    for i in range(len(samples)):
        value = samples.labels[i]
        known = isinstance(value, int | np.integer) and 0 <= value < len(names)
        labels.append(names[value] if known else None if value == -1 else value)
    return replace(samples, labels=labels, label_names=names)


# ------------------------------------------------------------------------------------------------ image folders


def _read_image_folder(root: Path) -> dict[str, Samples]:
    entries = [entry for entry in sorted(root.iterdir()) if not _ignored(entry)]
    if not entries:
        raise DataError(f"empty folder: {root}", hint="put one sub-folder of images per class into it")
    splits = {entry: SPLIT_NAMES.get(entry.name.lower()) for entry in entries}
    if all(splits.values()):
        found = [name for name in splits.values() if name]
        if len(set(found)) < len(found):
            raise DataError(f"two folders of the same split in {root}: {', '.join(e.name for e in entries)}", hint="keep one of them")
        return {name: _read_class_folders(entry) for entry, name in splits.items() if name}
    return {"train": _read_class_folders(root)}


def _read_class_folders(root: Path) -> Samples:
    images: list[Path] = []
    labels: list[str] = []
    for folder in sorted(root.iterdir()):
        if _ignored(folder):
            continue
        if not folder.is_dir():
            raise DataError(f"a file outside the class folders has no label: {folder}", hint="move it into the folder of its class")
        files = sorted(path for path in folder.rglob("*") if path.is_file() and not _ignored(path))
        for path in files:
            if path.suffix.lower() not in IMAGE_TYPES:
                raise DataError(f"not a known type of image: {path}", hint=f"remove it, or convert it to one of {', '.join(IMAGE_TYPES)}")
        if not files:
            raise DataError(f"a class without images: {folder}", hint="remove the folder, or put images into it")
        images += files
        labels += [folder.name] * len(files)
    return Samples(str(root), images, labels, lambda i: str(images[i]), "folder")


def _ignored(path: Path) -> bool:
    return path.name.startswith((".", "__")) or path.name.lower() in ("thumbs.db", "desktop.ini")


# ------------------------------------------------------------------------------------------------ objects in memory


def _read_object(source: Any, modality: str, columns: Columns, name: str = "") -> dict[str, Samples]:
    """Samples of a `datasets` object, a DataFrame, (X, y), [(x, y), …] or a map-style torch data set of (x, y)."""
    name = name or f"the given {type(source).__name__}"
    if isinstance(source, Samples):
        return {"train": source}
    if isinstance(source, Mapping):
        if unknown := [key for key in source if key.lower() not in SPLIT_NAMES and len(source) > 1]:
            raise DataError(
                f"unknown splits in {name}: {', '.join(unknown)}",
                detail=f"splits: {', '.join(source)}",
                hint=f"name them {', '.join(dict.fromkeys(SPLIT_NAMES.values()))}, or pass them one by one",
            )
        parts = {SPLIT_NAMES.get(key.lower(), "train"): part for key, part in source.items()}
        if len(parts) < len(source):
            raise DataError(f"two names of the same split in {name}: {', '.join(source)}", hint="pass the splits one by one")
        return {split: _read_object(part, modality, columns, f"{name}[{split}]")["train"] for split, part in parts.items()}
    if hasattr(source, "column_names") and hasattr(source, "features"):
        return {"train": _dataset_samples(source, modality, columns, name)}
    if hasattr(source, "columns") and hasattr(source, "iloc"):
        table = _Table(name, {str(c): source[c].tolist() for c in source.columns}, lambda i: f"{name}, row {i}", Path())
        return {"train": _table_samples(table, modality, columns)}
    return {"train": _pairs(source, name)}


def _dataset_samples(source: Any, modality: str, columns: Columns, name: str) -> Samples:
    import datasets

    for column, feature in source.features.items():
        if isinstance(feature, datasets.Image):
            source = source.cast_column(column, datasets.Image(decode=False))
    plain = source.with_format(None)
    found = {column: _Lazy(len(plain), lambda i, column=column: plain[i][column]) for column in plain.column_names}  # type: ignore[misc]
    names = tuple((c, tuple(f.names)) for c, f in source.features.items() if isinstance(f, datasets.ClassLabel) and f.names)
    # One column at a time is read whole (labels, texts); images stay where they are until they are needed.
    light = {c: v if isinstance(source.features[c], datasets.Image) else list(plain[c]) for c, v in found.items()}
    return _table_samples(_Table(name, light, lambda i: f"{name}, row {i}", None, names), modality, columns)


def _pairs(source: Any, name: str) -> Samples:
    def where(i: int) -> str:
        return f"{name}, item {i}"

    if isinstance(source, tuple) and len(source) == 2 and all(hasattr(part, "__len__") for part in source):
        inputs, labels = source
        if len(inputs) != len(labels):
            raise DataError(f"{name} has {len(inputs)} inputs and {len(labels)} labels", hint="give one label per input")
        return Samples(name, _Lazy(len(labels), lambda i: _plain(inputs[i])), [_plain(y) for y in _listed(labels)], where)
    if not hasattr(source, "__len__") or not hasattr(source, "__getitem__"):
        raise DataError(
            f"data of an unknown kind: {type(source).__name__}",
            hint="give a path, a list of (x, y), a pair (X, y), a DataFrame, a datasets.Dataset or a map-style torch data set",
        )
    count = len(source)
    labels = []
    for i in range(count):
        item = source[i]
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise DataError(f"{where(i)} is not a pair (x, y): {type(item).__name__}", hint="give (input, label) for every sample")
        labels.append(_plain(item[1]))
    return Samples(name, _Lazy(count, lambda i: _plain(source[i][0])), labels, where)


def _listed(values: Any) -> Iterable[Any]:
    listed: Iterable[Any] = values.tolist() if hasattr(values, "tolist") else values
    return listed


def _plain(value: Any) -> Any:
    """NumPy for a tensor (a Python number if it has one element and no axis), anything else as it is."""
    if hasattr(value, "detach") and hasattr(value, "numpy"):
        value = value.detach().cpu().numpy()
    return value.item() if isinstance(value, np.ndarray | np.generic) and value.ndim == 0 else value

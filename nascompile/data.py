"""Labelled samples ▸ four disjoint, encoded splits; test stays sealed until a choice has been written.

    RUN/data/data.json            DataManifest, written last
    RUN/data/preprocessor/        what turned raw samples into the arrays
    RUN/data/<split>/*.npy        one file per input, labels.npy, ids.npy (SHA-256 of each sample's content)
    RUN/data/test/*.sealed        the same, bit-inverted: no loader takes such a file for data by accident
    RUN/data/access.jsonl         every opening of a split
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from nascompile import data_sources, preprocess, records
from nascompile.data_sources import Columns, Samples
from nascompile.errors import DataError, RecordError
from nascompile.preprocess import Arrays, Preprocessor
from nascompile.records import Choice, Record

if TYPE_CHECKING:
    from nascompile.tasks import Task

Array = npt.NDArray[Any]
Progress = Callable[[str, int, int], None]
"""progress(what is being done, done, total)."""

SPLITS = ("train", "calibration", "validation", "test")
CLAIMS = ("test", "validation", "calibration", "train")
"""Who keeps a sample that two splits hold: the first of these."""
MANIFEST, ACCESS, CHOICE = "data.json", "access.jsonl", "choice.json"
CHUNK = 256
REGRESSION_STRATA = 10
LOOKED_AT = 16
"""Images whose size decides that of a network made for them."""


class DataSettings(Record, frozen=True):
    """What the user says about data; the defaults are stated here and nowhere else."""

    data: str = ""
    """CSV, TSV, JSONL or Parquet file, image folder, or `datasets` name or folder; may hold several splits."""
    calibration: str = ""
    validation: str = ""
    test: str = ""
    text_columns: tuple[str, ...] = ()
    """Columns of the texts, two for pairs; none: recognized by name, like the next two."""
    image_column: str = ""
    """Column of the images or their paths."""
    label_column: str = ""
    test_size: float = 0.2
    """Share of all samples, or their number if 1 or more, where no test data is given."""
    validation_size: float = 0.2
    """As `test_size`, where no validation data is given."""
    calibration_size: int = 256
    """Taken out of train, but never more than a quarter of it."""
    max_length: int = 0
    """Tokens per text; 0: the 95th percentile of the training texts, rounded up to a multiple of 8."""
    seed: int = 0
    """Of the splits that are drawn."""


class SplitInfo(Record, frozen=True):
    """One stored split: what it holds, and what was left out of it."""

    name: str
    samples: int
    digest: str
    """Of contents, labels and preprocessing, in order."""
    source: str
    class_counts: tuple[tuple[str, int], ...] = ()
    duplicates: int = 0
    """Samples left out because the same content is in this split already, or in one that comes before it in CLAIMS."""
    conflicts: int = 0
    """Samples left out because the same content carries different labels in the same source."""
    truncated: int = 0
    """Texts longer than the maximum length."""


class DataManifest(Record, frozen=True):
    """`data.json`: everything about the stored splits except their numbers."""

    task: str
    label_names: tuple[str, ...]
    head: Literal["kept", "new"]
    """Whether the labels are those of the model's own head."""
    modality: str
    max_length: int
    splits: tuple[SplitInfo, ...]
    settings: DataSettings
    preprocessing_digest: str

    def split(self, name: str) -> SplitInfo:
        return next(info for info in self.splits if info.name == name)

    @property
    def digest(self) -> str:
        """Of what a stage that reads the splits depends on."""
        return records.digest(self.task, self.label_names, tuple((info.name, info.digest) for info in self.splits))


@dataclass(frozen=True, eq=False)
class Split:
    """An open split. `inputs` are stored arrays (memory-mapped except for test); `batches` gives what the network reads."""

    name: str
    inputs: Arrays
    labels: Array
    """(n,) int64 class indices or float32 values."""
    ids: Array
    """(n, 32) uint8: SHA-256 of each sample's content."""
    digest: str
    preprocessor: Preprocessor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Sequence[int] | Array) -> Split:
        """The samples at these indices, in this order, in memory."""
        chosen = np.asarray(indices, dtype=np.int64)
        digest = hashlib.sha256(self.digest.encode() + chosen.tobytes()).hexdigest()
        inputs = {name: array[chosen] for name, array in self.inputs.items()}
        return replace(self, inputs=inputs, labels=self.labels[chosen], ids=self.ids[chosen], digest=digest)

    def arrays(self) -> Arrays:
        """All samples as the network reads them, in memory."""
        return self.preprocessor.finish(self.inputs)

    def batches(
        self, size: int, seed: int | None = None, epoch: int = 0, start: int = 0, drop_last: bool = False
    ) -> Iterator[tuple[Arrays, Array]]:
        """(inputs, labels) batch by batch from batch number `start` on: in stored order, or shuffled by (seed, epoch) given a seed."""
        order = np.arange(len(self)) if seed is None else np.random.default_rng((seed, epoch)).permutation(len(self))
        for first in range(start * size, len(order), size):
            chosen = order[first : first + size]
            if drop_last and len(chosen) < size:
                return
            yield self.preprocessor.finish({name: array[chosen] for name, array in self.inputs.items()}), self.labels[chosen]


def class_weights(labels: Array, classes: int) -> npt.NDArray[np.float32]:
    """(classes,): n / (classes present · samples of the class), so that all weigh the same in sum; 0 for a class without samples."""
    counts = np.bincount(labels, minlength=classes)
    weights = len(labels) / (np.count_nonzero(counts) * np.maximum(counts, 1))
    return np.where(counts > 0, weights, 0).astype(np.float32)


# ------------------------------------------------------------------------------------------------ preparing


def prepare(
    settings: DataSettings,
    preprocessor: Preprocessor,
    task: Task,
    folder: Path,
    *,
    id2label: Mapping[int, str] | None = None,
    sources: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> DataManifest:
    """Read, check, deduplicate, split, encode and store; the manifest. `id2label`: labels of the model's own head, if it has one;
    `sources`: objects in memory by split name, instead of the paths of the settings. Nothing is left behind by a failure.

    DataError on data that cannot be used, or if the test of this run has been read and these would be other data."""
    progress = progress or (lambda what, done, total: None)
    given = _read_sources(settings, preprocessor, sources or {})
    _check_labels(given, task)
    label_names, head = _label_names(given["train"], task, id2label)
    items = {name: _items(samples, preprocessor, task, label_names, progress) for name, samples in given.items()}
    kept, duplicates, conflicts = _deduplicate(items)
    drawn = _draw(kept, items, settings, classification=bool(label_names), names=label_names)
    if settings.max_length:
        preprocessor = preprocessor.with_max_length(settings.max_length)
    preprocessor = preprocessor.fitted(_Rows(given, drawn["train"]))
    preprocessing_digest = records.digest(preprocessor.settings)
    with _new_folder(folder) as temporary:
        infos = []
        for name in SPLITS:
            source = name if name in given else "train"
            encoded = _write_split(temporary, name, _Rows(given, drawn[name]), drawn[name], items, preprocessor, progress)
            labels = np.array([items[s].labels[i] for s, i in drawn[name]])
            counts = np.bincount(labels, minlength=len(label_names)) if label_names else ()
            infos.append(
                SplitInfo(
                    name=name,
                    samples=len(labels),
                    digest=_split_digest(drawn[name], items, preprocessing_digest),
                    source=given[source].source,
                    class_counts=tuple(zip(label_names, map(int, counts), strict=True)),
                    duplicates=duplicates.get(name, 0),
                    conflicts=conflicts.get(name, 0),
                    truncated=encoded,
                )
            )
        manifest = DataManifest(
            task=task.name,
            label_names=label_names,
            head=head,
            modality=preprocessor.settings.modality,
            max_length=preprocessor.settings.max_length,
            splits=tuple(infos),
            settings=settings,
            preprocessing_digest=preprocessing_digest,
        )
        for file, content in preprocessor.files().items():
            records.write_atomic(temporary / "preprocessor" / file, content)
        records.save(manifest, temporary / MANIFEST)
        _replace_folder(temporary, folder, manifest)
    return manifest


def load_manifest(folder: Path) -> DataManifest:
    """`data.json` of a data folder; RecordError if the data has not been prepared."""
    return records.load(folder / MANIFEST, DataManifest)


def image_shape(settings: DataSettings, sources: Mapping[str, Any] | None = None) -> tuple[int, int, int]:
    """Height, width and channels that hold the first images of train: what a network that is made for them has to take."""
    columns = Columns(settings.text_columns, settings.image_column, settings.label_column)
    source = (sources or {}).get("train", settings.data)
    if source is None or (isinstance(source, str) and not source):
        raise DataError("no training data: none was named", hint="give --data FILE, a folder, or a data set's name")
    given = data_sources.read(source, "image", columns)
    inputs = (given.get("train") or next(iter(given.values()))).inputs
    shapes = [preprocess.image_shape(inputs[i]) for i in range(min(LOOKED_AT, len(inputs)))]
    height, width, channels = (max(sizes) for sizes in zip(*shapes, strict=True))
    return height, width, channels


@dataclass(frozen=True, eq=False)
class _Items:
    """Encoded labels and content digests of one source, in its order."""

    labels: Array
    ids: list[bytes]


Place = tuple[str, int]
"""(source split, index in it)."""


class _Rows(Sequence[Any]):
    """Raw inputs at the given places, read when asked for."""

    def __init__(self, given: Mapping[str, Samples], places: Sequence[Place]) -> None:
        self._given, self._places = given, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._given[source].inputs[i] for source, i in self._places[index]]
        source, i = self._places[index]
        return self._given[source].inputs[i]


def _read_sources(settings: DataSettings, preprocessor: Preprocessor, objects: Mapping[str, Any]) -> dict[str, Samples]:
    if unknown := [name for name in objects if name not in SPLITS]:
        raise DataError(f"unknown split: {unknown[0]}", hint=f"splits are: {', '.join(SPLITS)}")
    columns = Columns(settings.text_columns, settings.image_column, settings.label_column)
    wanted = {"train": settings.data, **{name: getattr(settings, name) for name in SPLITS[1:]}, **objects}
    if wanted["train"] is None or (isinstance(wanted["train"], str) and not wanted["train"]):
        raise DataError("no training data: none was named", hint="give --data FILE, a folder, or a data set's name")
    modality = preprocessor.settings.modality
    given = data_sources.read(wanted["train"], modality, columns)
    if "train" not in given:
        raise DataError(f"no training split in {wanted['train']}: only {', '.join(given)}", hint="add one named train")
    for name in SPLITS[1:]:
        source = wanted[name]
        if source is not None and not (isinstance(source, str) and not source):
            parts = data_sources.read(source, modality, columns)
            if name not in parts and len(parts) > 1:
                raise DataError(f"no {name} split in {source}: only {', '.join(parts)}", hint="name a source with one split")
            given[name] = parts.get(name) or next(iter(parts.values()))
    return given


def _check_labels(given: Mapping[str, Samples], task: Task) -> None:
    """DataError at the first sample without a label, or whose label train lacks."""
    for name, samples in given.items():
        for i, label in enumerate(samples.labels):
            if label is None or (isinstance(label, str) and not label.strip()) or (isinstance(label, float) and np.isnan(label)):
                raise DataError(
                    f"no label in column `{samples.label_column}` ({name}): {samples.where(i)}",
                    hint="label the sample, or leave it out; another column: --label-column",
                )
    train = given["train"]
    try:
        classes = task.labels(train.labels)
    except DataError as error:
        _check_readable(given, task)
        detail = f"column `{train.label_column}` of {train.source}"
        raise DataError(error.message, detail=detail, hint=error.hint) from error
    if not classes:
        return _check_readable(given, task)
    known = {_spelling(label) for label in train.labels}
    for name in SPLITS[1:]:
        for i, label in enumerate(given[name].labels if name in given else ()):
            if _spelling(label) not in known:
                raise DataError(
                    f"a label of {name} that train lacks: {label!r} ({given[name].where(i)})",
                    hint=f"labels of train: {', '.join(sorted({str(value) for value in train.labels})[:20])}",
                )


def _check_readable(given: Mapping[str, Samples], task: Task) -> None:
    """DataError naming the row of the first label that the task cannot read as a value."""
    for samples in given.values():
        for i, label in enumerate(samples.labels):
            try:
                task.encode([label], (str(label),))
            except DataError as error:
                message = f"column `{samples.label_column}`, {samples.where(i)}: {error.message}"
                raise DataError(message, detail=error.detail, hint=error.hint) from error


def _spelling(label: Any) -> str:
    """A label as compared between splits and with a model's head: any case, integers without a fraction."""
    if isinstance(label, float | np.floating) and float(label).is_integer():
        label = int(label)
    return str(label).strip().casefold()


def _label_names(train: Samples, task: Task, id2label: Mapping[int, str] | None) -> tuple[tuple[str, ...], Literal["kept", "new"]]:
    """The head's own labels where the data's can be matched to them, else the data's."""
    found = task.labels(train.labels)
    if not found:
        return (), "kept" if id2label is not None and len(id2label) == 1 else "new"
    if id2label:
        own = tuple(str(id2label[i]) for i in sorted(id2label, key=int))
        spelled = {_spelling(name) for name in own}
        if all(_spelling(name) in spelled for name in found):
            return own, "kept"
        anonymous = all(name == f"LABEL_{i}" for i, name in enumerate(own))
        if train.label_names and anonymous and len(train.label_names) == len(own):
            return train.label_names, "kept"
        if all(name.isdecimal() and int(name) < len(own) for name in found):
            return own, "kept"
    return train.label_names or found, "new"


def _items(samples: Samples, preprocessor: Preprocessor, task: Task, label_names: tuple[str, ...], progress: Progress) -> _Items:
    ids = []
    for i in range(len(samples)):
        try:
            ids.append(preprocessor.content_digest(preprocessor.canonical(samples.inputs[i])))
        except DataError as error:
            raise DataError(f"{samples.where(i)}: {error.message}", detail=error.detail, hint=error.hint) from error
        if i % CHUNK == 0 or i + 1 == len(samples):
            progress(f"reading {samples.source}", i + 1, len(samples))
    return _Items(task.encode(samples.labels, label_names), ids)


def _deduplicate(items: Mapping[str, _Items]) -> tuple[dict[str, list[int]], dict[str, int], dict[str, int]]:
    """Per source: indices kept in order; counts of duplicates and of samples with contradictory labels that were left out."""
    kept: dict[str, list[int]] = {}
    duplicates: dict[str, int] = {}
    conflicts: dict[str, int] = {}
    claimed: set[bytes] = set()
    for name in (name for name in CLAIMS if name in items):
        part = items[name]
        labels_of: dict[bytes, set[float]] = {}
        for key, label in zip(part.ids, part.labels.tolist(), strict=True):
            labels_of.setdefault(key, set()).add(label)
        kept[name], duplicates[name], conflicts[name] = [], 0, 0
        for i, key in enumerate(part.ids):
            if len(labels_of[key]) > 1:
                conflicts[name] += 1
            elif key in claimed:
                duplicates[name] += 1
            else:
                kept[name].append(i)
                claimed.add(key)
        claimed |= set(labels_of)  # what contradicts itself here is no truth for the splits that follow either
        if not kept[name]:
            raise DataError(
                f"nothing is left of {name}: {duplicates[name]} duplicates, {conflicts[name]} with contradictory labels",
                hint="give splits that do not hold the same samples",
            )
    return kept, duplicates, conflicts


def _draw(
    kept: Mapping[str, list[int]], items: Mapping[str, _Items], settings: DataSettings, *, classification: bool, names: tuple[str, ...]
) -> dict[str, list[Place]]:
    """Places of the four splits: given ones as they are, the others drawn from train, stratified and seeded."""
    splits: dict[str, list[Place]] = {name: [(name, i) for i in kept[name]] for name in kept if name != "train"}
    # By content, so that the order of the rows of a file does not decide who learns and who tests.
    pool = np.array(sorted(kept["train"], key=lambda i: items["train"].ids[i]), dtype=np.int64)
    labels = items["train"].labels
    strata = labels.astype(np.int64) if classification else _quantile_strata(labels, pool)
    to_draw = [name for name in ("test", "validation") if name not in splits]
    counts = {name: _count(getattr(settings, f"{name}_size"), len(pool), name) for name in to_draw}
    _check_enough(strata[pool], counts, "calibration" not in splits, names if classification else ())
    for offset, name in enumerate(to_draw):
        reserve = len(to_draw) - offset if classification else 0
        chosen = _stratified(pool, strata, counts[name], np.random.default_rng((settings.seed, offset)), reserve)
        splits[name] = [("train", int(i)) for i in chosen]
        pool = pool[~np.isin(pool, chosen)]
    if "calibration" not in splits:
        count = max(1, min(_count(settings.calibration_size, len(pool), "calibration"), len(pool) // 4))
        chosen = _stratified(pool, strata, count, np.random.default_rng((settings.seed, 2)), 1 if classification else 0)
        splits["calibration"] = [("train", int(i)) for i in chosen]
        pool = pool[~np.isin(pool, chosen)]
    pool = np.random.default_rng((settings.seed, 3)).permutation(pool)
    return {**splits, "train": [("train", int(i)) for i in pool]}


def _quantile_strata(values: Array, pool: Array) -> Array:
    """Tenths of the pool's values, so that a regression's splits cover the same range."""
    edges = np.quantile(values[pool], np.linspace(0, 1, REGRESSION_STRATA + 1)[1:-1])
    return np.searchsorted(edges, values, side="right")


def _count(size: float, total: int, name: str) -> int:
    if not size > 0:
        raise DataError(f"{name} cannot be empty: a size of {size:g}", hint=f"give a share below 1, a number of samples, or --{name}")
    return max(1, round(size * total)) if size < 1 else round(size)


def _check_enough(strata: Array, counts: Mapping[str, int], calibration: bool, names: tuple[str, ...]) -> None:
    """DataError if the pool cannot give every drawn split, and train, a sample of each class."""
    needed = 1 + len(counts)
    found = np.bincount(strata, minlength=len(names))
    if names and (rare := [f"{name} ({n})" for name, n in zip(names, found, strict=True) if 0 < n < needed]):
        raise DataError(
            f"too few samples to split: a class needs {needed} different ones, {', '.join(rare)}",
            hint="add samples, leave these classes out, or give --validation and --test of your own",
        )
    classes = np.count_nonzero(found) if names else 1
    least = sum(max(count, classes) for count in counts.values()) + classes + (1 if calibration else 0)
    if len(strata) < least:
        raise DataError(
            f"too few samples for four splits: {len(strata)} different ones, at least {least} needed",
            detail=f"drawn from them: {', '.join(f'{count} {name}' for name, count in counts.items()) or 'calibration'}",
            hint="add samples, ask for smaller splits, or give splits of your own",
        )


def _stratified(pool: Array, strata: Array, count: int, rng: np.random.Generator, reserve: int) -> Array:
    """`count` members of the pool, each stratum in proportion, shuffled; at least one of a stratum that has more than `reserve`, which
    are left in it."""
    groups = [rng.permutation(pool[strata[pool] == stratum]) for stratum in np.unique(strata[pool])]
    room = np.array([max(len(group) - reserve, 0) for group in groups])
    if room.sum() < count:
        raise DataError(
            f"too few samples to split: {len(pool)} are left to draw {count} from, {reserve} of each class set aside",
            hint="add samples, ask for smaller splits, or give splits of your own",
        )
    share = np.array([len(group) for group in groups]) * count / len(pool)
    quota = np.minimum(np.floor(share).astype(int), room)
    if count >= len(groups):
        quota = np.maximum(quota, np.minimum(1, room))
    while quota.sum() < count:
        lag = np.where(quota < room, share - quota, -np.inf)
        quota[int(lag.argmax())] += 1
    while quota.sum() > count:
        quota[int(np.where(quota > 1, quota - share, -np.inf).argmax())] -= 1
    return rng.permutation(np.concatenate([group[:n] for group, n in zip(groups, quota, strict=True)]))


def _split_digest(places: Sequence[Place], items: Mapping[str, _Items], preprocessing_digest: str) -> str:
    running = hashlib.sha256(preprocessing_digest.encode())
    for source, i in places:
        running.update(items[source].ids[i] + items[source].labels[i].tobytes())
    return running.hexdigest()


# ------------------------------------------------------------------------------------------------ storing


def _write_split(
    folder: Path,
    name: str,
    rows: Sequence[Any],
    places: Sequence[Place],
    items: Mapping[str, _Items],
    preprocessor: Preprocessor,
    progress: Progress,
) -> int:
    """Encode and store one split; the number of texts that were cut."""
    target = folder / name
    target.mkdir()
    writers: dict[str, _Writer] = {}
    truncated = 0
    for first in range(0, len(rows), CHUNK):
        chunk = rows[first : first + CHUNK]
        encoded = preprocessor.encode(chunk)
        truncated += _truncated(chunk, preprocessor)
        for key, values in encoded.items():
            if key not in writers:
                writers[key] = _Writer(target, key, values.dtype, (len(rows), *values.shape[1:]), sealed=name == "test")
            writers[key].write(values)
        progress(f"encoding {name}", min(first + CHUNK, len(rows)), len(rows))
    ids = np.frombuffer(b"".join(items[s].ids[i] for s, i in places), np.uint8).reshape(len(places), 32)
    labels = np.array([items[s].labels[i] for s, i in places])
    for key, values in (("labels", labels), ("ids", ids)):
        writers[key] = _Writer(target, key, values.dtype, values.shape, sealed=name == "test" and key == "labels")
        writers[key].write(values)
    for writer in writers.values():
        writer.close()
    return truncated


def _truncated(chunk: Sequence[Any], preprocessor: Preprocessor) -> int:
    if preprocessor.settings.modality != "text":
        return 0
    texts = [preprocessor.canonical(text) for text in chunk]
    return sum(bool(encoding.overflowing) for encoding in preprocessor.tokenizer.encode_batch(texts))


class _Writer:
    """An .npy file written in pieces; sealed: every byte inverted, under another suffix."""

    def __init__(self, folder: Path, key: str, dtype: Any, shape: tuple[int, ...], *, sealed: bool) -> None:
        self._sealed = sealed
        self._stream = (folder / f"{key}{'.sealed' if sealed else '.npy'}").open("wb")
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape})
        self._put(header.getvalue())

    def write(self, values: Array) -> None:
        self._put(np.ascontiguousarray(values).tobytes())

    def _put(self, content: bytes) -> None:
        self._stream.write(_inverted(content) if self._sealed else content)

    def close(self) -> None:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()


def _inverted(content: bytes) -> bytes:
    return np.invert(np.frombuffer(content, np.uint8)).tobytes()


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, removed on the way out; RecordError on a full disk."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        yield temporary
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RecordError(
                f"no space left on the disk to store the data: {folder}",
                hint="free some space and run the same command again; everything finished so far is kept",
            ) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace_folder(temporary: Path, folder: Path, manifest: DataManifest) -> None:
    """Put the new folder in the place of the old one; the record of what has been read stays, and so does data that test was read of."""
    if (folder / MANIFEST).exists():
        if any(entry["split"] == "test" for entry in accesses(folder)):
            if load_manifest(folder).digest == manifest.digest:
                return
            raise DataError(
                f"the test split of this run has been read, its data cannot change any more: {folder}",
                hint="start a new run for the changed data (--out runs/NAME)",
            )
        if (folder / ACCESS).exists():
            shutil.copy(folder / ACCESS, temporary / ACCESS)
    if folder.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".old", dir=folder.parent))
        os.rename(folder, old / "data")
        os.rename(temporary, folder)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(temporary, folder)


# ------------------------------------------------------------------------------------------------ reading


def open_split(folder: Path, name: str, purpose: str = "") -> Split:
    """A stored split, its opening written to `access.jsonl`. `folder`: RUN/data.

    DataError for test unless RUN/choice.json holds a valid Choice, or if test was already read for another one."""
    if name not in SPLITS:
        raise DataError(f"unknown split: {name}", hint=f"splits are: {', '.join(SPLITS)}")
    manifest = load_manifest(folder)
    info = manifest.split(name)
    choice = _choice_for_test(folder) if name == "test" else ""
    _log_access(folder, {"split": name, "purpose": purpose, "time": datetime.now(UTC).isoformat(timespec="seconds"), "choice": choice})
    return _read_split(folder, name, info)


def opened_split(folder: Path, name: str) -> Split:
    """A split that another process of this run has opened; nothing is written. DataError if none has, or for test."""
    if name == "test" or name not in {entry["split"] for entry in accesses(folder)}:
        raise DataError(f"no other process has opened this split: {name}", hint="open it with `open_split`, which says so in the log")
    return _read_split(folder, name, load_manifest(folder).split(name))


def _read_split(folder: Path, name: str, info: SplitInfo) -> Split:
    preprocessor = Preprocessor.from_folder(folder / "preprocessor")
    keys = (*preprocessor.settings.inputs, "labels")
    load = _load_sealed if name == "test" else _load_mapped
    try:
        arrays = {key: load(folder / name, key) for key in keys}
        ids = np.load(folder / name / "ids.npy", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"damaged split: {folder / name}", detail=str(error), hint="remove the data folder and prepare it again") from error
    if any(len(array) != info.samples for array in (*arrays.values(), ids)):
        raise DataError(f"damaged split: {folder / name}", detail=f"{info.samples} samples expected", hint="prepare the data again")
    labels = np.array(arrays.pop("labels"))
    return Split(name, arrays, labels, ids, info.digest, preprocessor)


def accesses(folder: Path) -> list[dict[str, str]]:
    """Every opening of a split of this folder so far, oldest first; DataError if the log has been damaged."""
    path = folder / ACCESS
    content = path.read_text(encoding="utf-8") if path.exists() else ""
    # A last line without its line break was being written when the process died, before the split was handed out.
    lines = content.split("\n")[:-1]
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line) if line else {}
        except ValueError as error:
            raise DataError(
                f"damaged line {number} of {path}: {line[:60]!r}", hint="whether test has been read is no longer known: start a new run"
            ) from error
        if entry:
            found.append(entry)
    return found


def _choice_for_test(folder: Path) -> str:
    """Digest of the run's choice, if test may be read for it."""
    path = folder.parent / CHOICE
    if not path.exists():
        raise DataError(
            f"test data read too early: {path} has not been written",
            hint="decide on validation; test is read once, after the choice (`nascompile rerank` writes it)",
        )
    try:
        choice = records.digest(records.load(path, Choice))
    except RecordError as error:
        raise DataError(f"test data read without a valid choice: {path}", detail=error.message, hint=error.hint) from error
    if earlier := {entry.get("choice", "") for entry in accesses(folder) if entry["split"] == "test"} - {choice}:
        raise DataError(
            f"test data was already read for another choice: {', '.join(sorted(digest[:12] for digest in earlier))}",
            detail=f"this choice: {choice[:12]}",
            hint="a test result chosen between is no test result: start a new run (--out runs/NAME)",
        )
    return choice


def _log_access(folder: Path, entry: Mapping[str, str]) -> None:
    path = folder / ACCESS
    torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    if torn:
        complete = path.read_bytes().rpartition(b"\n")
        records.write_atomic(path, complete[0] + complete[1])
    with path.open("ab") as stream:
        stream.write(records.encode(dict(entry)) + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def _load_mapped(folder: Path, key: str) -> Array:
    return np.asanyarray(np.load(folder / f"{key}.npy", mmap_mode="r", allow_pickle=False))


def _load_sealed(folder: Path, key: str) -> Array:
    content = _inverted((folder / f"{key}.sealed").read_bytes())
    return np.asanyarray(np.load(io.BytesIO(content), allow_pickle=False))

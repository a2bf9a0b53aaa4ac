"""An append-only file of records, one a line with its digest: a torn last line is dropped, any other damage is an error."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from nascompile.errors import RecordError
from nascompile.records import Record, digest, encode

R = TypeVar("R", bound=Record)


def append(path: Path, record: Record) -> None:
    """Add one line and force it to the disk; RecordError if the disk is full."""
    line = encode({"digest": digest(record)[:16], "record": type(record).__name__, "data": record}) + b"\n"
    _mend_tail(path)
    try:
        with path.open("ab") as stream:
            stream.write(line)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise RecordError(
            f"cannot write to {path.name}: {error.strerror}", hint="free some space and run the same command again; earlier lines are kept"
        ) from error


def read(path: Path, kind: type[R]) -> Iterator[R]:
    """Every whole line's record; RecordError with the line number where a line is damaged."""
    if not path.exists():
        return
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is a line that was being written
        try:
            body = msgspec.json.decode(line, type=_Line)
            if body.digest != hashlib.sha256(body.data).hexdigest()[:16]:
                raise _damaged(path, number, "its digest does not match its content")
            if body.record != kind.__name__:
                raise _damaged(path, number, f"it holds a {body.record}, not a {kind.__name__}")
            yield msgspec.json.decode(body.data, type=kind)
        except msgspec.MsgspecError as error:
            raise _damaged(path, number, str(error)) from error


class _Line(Record, frozen=True):
    digest: str
    record: str
    data: msgspec.Raw
    """As written: an integer given for a float reads back as a float, whose digest is another."""


def _damaged(path: Path, number: int, why: str) -> RecordError:
    return RecordError(
        f"damaged line in {path}: line {number}", detail=why,
        hint=f"delete that line (`sed -i {number}d {path}`) and run the same command again: only what it held is done again",
    )  # fmt: skip


def _mend_tail(path: Path) -> None:
    """Cut off a line that was being written when the process died."""
    if not path.exists():
        return
    with path.open("rb+") as stream:
        size = stream.seek(0, os.SEEK_END)
        if size == 0:
            return
        stream.seek(size - 1)
        if stream.read(1) != b"\n":
            stream.seek(0)
            stream.truncate(stream.read().rfind(b"\n") + 1)

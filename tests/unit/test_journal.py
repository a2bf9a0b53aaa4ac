"""The journal: nothing written is lost, a torn tail is forgotten, any other damage is named."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from nascompile import journal
from nascompile.errors import RecordError
from nascompile.records import Budget, Choice

ROWS = [Budget(metric=f"cost é {i}", bound=i + 0.1) for i in range(5)]


@pytest.fixture
def path(tmp_path):
    """A journal of five lines."""
    for row in ROWS:
        journal.append(tmp_path / "journal.jsonl", row)
    return tmp_path / "journal.jsonl"


def test_what_was_appended_is_read_in_order(path):
    assert list(journal.read(path, Budget)) == ROWS


def test_an_integer_given_for_a_float_is_no_damage(tmp_path):
    journal.append(tmp_path / "journal.jsonl", Budget(metric="drop", bound=1))
    assert list(journal.read(tmp_path / "journal.jsonl", Budget)) == [Budget(metric="drop", bound=1.0)]


def test_no_journal_is_an_empty_one(tmp_path):
    assert list(journal.read(tmp_path / "journal.jsonl", Budget)) == []


def test_a_journal_cut_anywhere_gives_its_whole_lines_and_goes_on(path):
    whole = path.read_bytes()
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        kept = whole[:length].count(b"\n")
        assert list(journal.read(path, Budget)) == ROWS[:kept]
        journal.append(path, ROWS[4])
        assert list(journal.read(path, Budget)) == [*ROWS[:kept], ROWS[4]]


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda line: line.replace(b'"bound":2.1', b'"bound":2.2'), "digest does not match"),
        (lambda line: line.replace(b'"Budget"', b'"Choice"'), "holds a Choice"),
        (lambda line: line[: len(line) // 2], ""),
        (lambda line: b"", ""),
        (lambda line: b"\0" * len(line), ""),
        (lambda line: b"[]", ""),
        (lambda line: b"{}", "digest"),
        (lambda line: line + line, ""),
    ],
)
def test_a_damaged_line_is_named_and_the_hint_repairs_it(path, damage, why):
    lines = path.read_bytes().split(b"\n")
    damaged = damage(lines[2])
    assert damaged != lines[2]
    path.write_bytes(b"\n".join([*lines[:2], damaged, *lines[3:]]))
    with pytest.raises(RecordError, match="line 3") as caught:
        list(journal.read(path, Budget))
    assert str(path) in caught.value.message
    assert why in caught.value.detail
    command = caught.value.hint.split("`")[1]
    subprocess.run(command, shell=True, check=True)
    assert list(journal.read(path, Budget)) == [*ROWS[:2], *ROWS[3:]]


def test_lines_before_the_damage_are_still_read(path):
    path.write_bytes(path.read_bytes().replace(b'"bound":2.1', b'"bound":2.2'))
    reader = journal.read(path, Budget)
    assert [next(reader), next(reader)] == ROWS[:2]
    with pytest.raises(RecordError):
        next(reader)


def test_a_record_of_another_class_is_refused(path):
    with pytest.raises(RecordError, match="line 1"):
        list(journal.read(path, Choice))


def test_a_full_disk_loses_no_earlier_line(path, monkeypatch):
    class Full:
        """A file that takes ten bytes and then no more, as a full disk does."""

        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.stream.close()

        def write(self, content):
            self.stream.write(content[:10])
            self.stream.flush()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    opened = type(path).open

    def open_full(self, mode="r", *rest):
        return Full(opened(self, mode, *rest)) if mode == "ab" else opened(self, mode, *rest)

    monkeypatch.setattr(type(path), "open", open_full)
    with pytest.raises(RecordError, match=r"cannot write to journal\.jsonl: No space left"):
        journal.append(path, ROWS[0])
    monkeypatch.undo()
    assert list(journal.read(path, Budget)) == ROWS
    journal.append(path, ROWS[0])
    assert list(journal.read(path, Budget)) == [*ROWS, ROWS[0]]


WRITER = """
import sys
from pathlib import Path
from nascompile import journal
from nascompile.records import Budget
for i in range(1_000_000):
    journal.append(Path(sys.argv[1]), Budget(metric="x" * 2000, bound=i))
    print(i, flush=True)
"""


def test_killed_while_writing_nothing_confirmed_is_lost(tmp_path):
    path = tmp_path / "journal.jsonl"
    confirmed = 0
    for _ in range(3):
        before = len(list(journal.read(path, Budget)))
        with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout
            for _ in range(5):
                writer.stdout.readline()
            time.sleep(0.01)
            writer.send_signal(signal.SIGKILL)
            rest = writer.stdout.read().splitlines()
        confirmed = before + 5 + len(rest)
        found = [row.bound for row in journal.read(path, Budget)]
        assert len(found) in (confirmed, confirmed + 1)  # the last line may be written but not yet confirmed
        assert found[before:] == list(range(len(found) - before))

"""Records: stored whole or not at all, read back equal, refused when they are something else."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, strategies as st

from nascompile import records
from nascompile.errors import RecordError
from nascompile.records import INT8, Budget, Candidate, Choice, Operator, Quantity, Score

SCORE = Score(
    metric="accuracy", direction="maximize", value=91.25, n=400, stderr=1.4, split_digest="a", weights_digest="b",
    evaluator_digest="c", per_sample=(1.0, 0.0),
)  # fmt: skip
CHOICE = Choice(engine="candidate-1", reason="lowest latency", budgets=(Budget(metric="drop", bound=1.0),), ranking=("candidate-1",))
OPERATOR = Operator(kind="mlp", dims=(("batch", 1), ("hidden", 64)), attributes=(("act", "gelu"),), precision=INT8)
CANDIDATE = Candidate(space="s", architecture=(("depth", 3),), precision=(("cpu", (("mlp.precision", "int8"),)),))


@pytest.mark.parametrize("record", [SCORE, CHOICE, OPERATOR, CANDIDATE], ids=lambda record: type(record).__name__)
def test_a_record_comes_back_equal(record, tmp_path):
    records.save(record, tmp_path / "deep" / "record.json")
    assert records.load(tmp_path / "deep" / "record.json", type(record)) == record
    assert list((tmp_path / "deep").iterdir()) == [tmp_path / "deep" / "record.json"]


@given(st.floats(allow_nan=False, allow_infinity=False), st.text(), st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1e9))))
def test_numbers_and_texts_survive_exactly(value, unit, quantiles):
    quantity = Quantity(value=value, unit=unit, kind="measured", quantiles=tuple(quantiles))
    assert msgspec.json.decode(records.encode(quantity), type=Quantity) == quantity


def test_a_digest_depends_on_content_alone():
    assert records.digest({"a": 1, "b": 2}) == records.digest({"b": 2, "a": 1})
    assert records.digest(CANDIDATE) == records.digest(msgspec.structs.replace(CANDIDATE))
    different = {records.digest(x) for x in ("ab", ["a", "b"], "a", CANDIDATE, msgspec.structs.replace(CANDIDATE, space="t"))}
    assert len(different | {records.digest("a", "b")}) == 6


def test_an_unknown_field_is_refused(tmp_path):
    path = tmp_path / "choice.json"
    records.save(CHOICE, path)
    body = json.loads(path.read_text())
    body["data"]["surprise"] = 1
    path.write_text(json.dumps(body))
    with pytest.raises(RecordError, match="damaged file") as caught:
        records.load(path, Choice)
    assert "surprise" in caught.value.detail


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"record": "Score", "version": 1, "data": {}}', "not a Choice of version 1"),
        ('{"record": "Choice", "version": 2, "data": {}}', "not a Choice of version 1"),
        ('["Choice"]', "not a Choice"),
        ('{"record": "Choice", "version": 1}', "damaged file"),
        ('{"record": "Choice", "version": 1, "data": {"engine": 3}}', "damaged file"),
        ('{"record": "Choice", "version": 1, "da', "damaged file"),
        ("", "damaged file"),
    ],
)
def test_what_is_no_such_record_is_refused(content, says, tmp_path):
    (tmp_path / "choice.json").write_text(content)
    with pytest.raises(RecordError, match=says) as caught:
        records.load(tmp_path / "choice.json", Choice)
    assert "choice.json" in caught.value.message
    assert caught.value.hint


def test_a_missing_file_names_itself(tmp_path):
    with pytest.raises(RecordError, match=r"no such file: .*choice\.json"):
        records.load(tmp_path / "choice.json", Choice)


def test_every_cut_of_a_stored_file_is_refused(tmp_path):
    path = tmp_path / "choice.json"
    records.save(CHOICE, path)
    whole = path.read_bytes()
    for length in range(len(whole.rstrip())):
        path.write_bytes(whole[:length])
        with pytest.raises(RecordError):
            records.load(path, Choice)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_keeps_the_old_file(code, call, tmp_path, monkeypatch):
    path = tmp_path / "choice.json"
    records.save(CHOICE, path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(records.os, call, full)
    with pytest.raises(RecordError, match=r"no space left on the disk to write choice\.json") as caught:
        records.save(msgspec.structs.replace(CHOICE, reason="another"), path)
    assert caught.value.detail == f"folder: {tmp_path}"
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_another_error_of_the_disk_is_not_taken_for_a_full_one(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(records.os, "fsync", broken)
    with pytest.raises(OSError, match="broken"):
        records.save(CHOICE, tmp_path / "choice.json")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("a small file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_really_is_full(small_disk):
    path = small_disk / "score.json"
    records.save(SCORE, path)
    large = msgspec.structs.replace(SCORE, per_sample=(0.123456789,) * 20_000)
    with pytest.raises(RecordError, match="no space left"):
        records.save(large, path)
    assert records.load(path, Score) == SCORE
    assert list(small_disk.iterdir()) == [path]


def test_file_digest_is_sha256(tmp_path: Path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert records.file_digest(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"

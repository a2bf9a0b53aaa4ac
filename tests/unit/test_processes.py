"""Which of several processes this is, without starting any: `tests/stages/test_several_processes.py` does."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import accelerate
import pytest

from nascompile import processes
from nascompile.errors import DataError, NascompileError, UnsupportedError
from nascompile.processes import ALONE, Team


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in (*processes.SIZES, "MASTER_ADDR", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    processes.join.cache_clear()
    yield
    processes.join.cache_clear()


def test_without_a_launcher_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert processes.join() is ALONE
    assert (ALONE.leads, ALONE.size, ALONE.remark) == (True, 1, "")
    monkeypatch.setenv("WORLD_SIZE", "1")
    processes.join.cache_clear()
    assert processes.join() is ALONE


def test_one_process_where_several_were_meant_is_remarked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `accelerate launch --cpu --num_processes 2` sets, and what a cluster may set for everybody."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert ALONE.remark == ""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert "accelerate started one process" in ALONE.remark


@pytest.mark.parametrize("name", processes.SIZES)
def test_processes_that_cannot_meet_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each would take itself for the only one."""
    monkeypatch.setenv(name, "3")
    monkeypatch.setattr(accelerate, "PartialState", lambda cpu: SimpleNamespace(num_processes=1))
    with pytest.raises(UnsupportedError, match="a launcher started 3 processes, accelerate found 1"):
        processes.join()


def test_an_error_is_said_to_those_who_wait_and_only_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    monkeypatch.setattr(Team, "_send", lambda team, length, content=b"": sent.append(length))
    with Team(0, 2).leading():
        pass
    with pytest.raises(DataError), Team(0, 2).leading():
        raise DataError("bad")
    assert sent == [processes.ENDED, processes.FAILED]
    team = Team(0, 2)
    with pytest.raises(DataError), team.leading(), team.together():  # the others are in a training: sending would wait for them
        raise DataError("bad")
    assert sent == [processes.ENDED, processes.FAILED]


def test_only_errors_about_others_are_taken_for_their_end() -> None:
    lost = RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    with pytest.raises(NascompileError, match="another of the 2 processes"), Team(1, 2).together():
        raise lost
    with pytest.raises(RuntimeError, match="out of memory"), Team(1, 2).together():
        raise RuntimeError("out of memory")


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "nascompile", "--help"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "finetune" in done.stdout

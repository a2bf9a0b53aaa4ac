"""Reasons to end a search: Ctrl-C once and twice, time, and a hypervolume that has stopped growing."""

from __future__ import annotations

import os
import signal
import threading
import time

import numpy as np
import pytest

from nascompile.stopping import IMPROVEMENT, Stopping, gain, reference


def press(count: int = 1) -> None:
    for _ in range(count):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(autouse=True)
def default_handler():
    """Python's own, whatever a shell in the background has left."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_first_ctrl_c_is_a_reason_to_stop_the_second_quits():
    notes: list[str] = []
    with Stopping(note=notes.append) as stop:
        assert stop.go_on()
        press()
        assert not stop.go_on()
        assert stop.after(np.ones((3, 2))) == "interrupted"
        assert len(notes) == 1
        assert "once more quits" in notes[0]
        with pytest.raises(KeyboardInterrupt):
            press()
    with pytest.raises(KeyboardInterrupt):  # what comes after a search is interrupted as ever
        press()


def test_a_handler_of_somebody_elses_is_left_alone():
    pressed = []
    signal.signal(signal.SIGINT, lambda *_: pressed.append(1))
    with Stopping() as stop:
        press()
        assert stop.go_on()
    assert pressed == [1]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Stopping() as stop:
        press()
        assert stop.go_on()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_outside_of_the_main_thread_signals_are_not_its_business():
    def search() -> None:
        with Stopping() as stop:
            found.append(stop.go_on())

    found: list[bool] = []
    thread = threading.Thread(target=search)
    thread.start()
    thread.join()
    assert found == [True]


def test_time_ends_a_search_only_when_something_was_scored():
    with Stopping(deadline=time.monotonic() - 1) as stop:
        assert stop.go_on()
        stop.scored = 1
        assert not stop.go_on()
        assert stop.after(np.ones((1, 2))) == "out of time"
        assert stop.left() < 0
    with Stopping(deadline=time.monotonic() + 60) as stop:
        stop.scored = 1
        assert stop.go_on()
        assert stop.after(np.ones((1, 2))) == ""
        assert 59 < stop.left() <= 60


def better(n: int) -> list[list[float]]:
    """n points on the diagonal, each dominating all before."""
    return [[10.0 - i, 10.0 - i] for i in range(n)]


def test_patience_counts_batches_that_scored_something():
    worse = [[9.5, 9.5]] * 4
    with Stopping(patience=2) as stop:
        points = better(2)
        assert stop.after(np.array(points)) == ""
        points += worse[:2]
        assert stop.after(np.array(points)) == ""
        assert stop.after(np.array(points)) == ""  # nothing was scored
        points += worse[2:]
        assert stop.after(np.array(points)) == "no better hypervolume in 2 batches"
    with Stopping(patience=0) as stop:
        assert [stop.after(np.array(points[:n])) for n in range(1, 7)] == [""] * 6


def test_patience_starts_anew_with_every_better_batch():
    points: list[list[float]] = []
    with Stopping(patience=1) as stop:
        for n in range(1, 5):
            points = better(n)
            assert stop.after(np.array(points)) == ""
        assert stop.after(np.array([*points, points[0]])) == "no better hypervolume in 1 batch"


@pytest.mark.parametrize(("factor", "ends"), [(0.5, True), (2.0, False)])
def test_growth_below_a_thousandth_is_none(factor, ends):
    """One box of side 1 below the reference, made longer by so much."""
    corner = reference([[1.0, 1.0], [2.0, 2.0]])
    assert corner.tolist() == pytest.approx([2.02, 2.02])
    longer = 1.0 - 1.02 * factor * IMPROVEMENT
    points = [[1.0, 1.0], [2.0, 2.0], [longer, 1.0]]
    assert gain(points, 2) == pytest.approx(factor * IMPROVEMENT, rel=1e-6)
    with Stopping(patience=1) as stop:
        stop.after(np.array(points[:2]))
        assert bool(stop.after(np.array(points))) is ends


def test_growth_is_of_what_was_covered_below_a_reference_beyond_the_worst():
    """2.02 by 1.01: a strip of .02 by 1.01 at first, then one of 1.02 by .01 as well, of which .02 by .01 is the same."""
    assert gain([[2.0, 0.0], [1.0, 1.0]], 1) == pytest.approx((0.0202 + 0.0102 - 0.0002) / 0.0202 - 1)
    assert gain([[0.0, 0.0]], 1) == 0

"""The harness over a serial line: the same bytes and counts as by semihosting, from QEMU's UART behind a pseudo-terminal."""

from __future__ import annotations

import os
import pty
import signal
import sys
import threading
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest

from nascompile import plugins, targets
from nascompile.devices import Job
from nascompile.errors import UnsupportedError
from nascompile.mcu import interpreter, serial_line, toolchain, transformer
from nascompile.mcu.board import CORES, CYCLE_MODEL
from nascompile.records import Target, Workload

SHAPE = transformer.Shape.uniform((16, 16, 3), 8, 16, 1, 2, 24, 4)
FLASHER = """
import os, subprocess, sys
elf, port, pid = sys.argv[1:]
command = "qemu-system-arm -M mps2-an500 -display none -monitor none -serial pty -icount shift=6 -kernel".split() + [elf]
log = open(port + ".log", "w+")
board = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
open(pid, "w").write(str(board.pid))
while "/dev/pts/" not in (said := open(port + ".log").read()):
    assert board.poll() is None, said
if os.path.lexists(port):
    os.unlink(port)
os.symlink(next(word for word in said.split() if word.startswith("/dev/pts/")), port)
"""
"""Stands for st-flash and the like: afterwards the board runs, and its line is at the port."""


@pytest.fixture(scope="module")
def built(tmp_path_factory, mcu_tools):
    """(folder, graphs, target, program) of an engine for the F746."""
    program = transformer.build("small", SHAPE, transformer.RandomNumbers(2), "blocks")
    target = targets.make("stm32f746", "", Workload(resolution=(16, 16), sequence=5))
    folder = tmp_path_factory.mktemp("engine")
    return folder, plugins.get("backends", "mcu_c").build(program, target, folder), target, program


@pytest.fixture
def settings(tmp_path):
    """Session settings of a board that is QEMU; it is switched off at the end."""
    (tmp_path / "flash.py").write_text(FLASHER)
    pid = tmp_path / "pid"
    yield {
        "port": str(tmp_path / "port"), "make": "firmware_uart.elf",
        "flash_command": f"{sys.executable} {tmp_path / 'flash.py'} {{elf}} {tmp_path / 'port'} {pid}",
    }  # fmt: skip
    if pid.is_file():
        os.kill(int(pid.read_text()), signal.SIGKILL)


def test_a_board_gives_the_same_bytes_and_counts(built, settings):
    folder, _, _, program = built
    x = np.random.default_rng(0).integers(-128, 128, (3, *SHAPE.image)).astype(np.int8)
    found = serial_line.run(folder, serial_line.Settings.of(settings), x)
    assert found.outputs.tobytes() == b"".join(interpreter.run(program, image).tobytes() for image in x)
    semihosted = toolchain.run_emulated(folder, CORES["cortex-m7"], x)
    assert found.unit == semihosted.unit == "instructions"
    difference = found.counts.astype(int) - semihosted.counts
    assert (difference[:, 1:] == 0).all(), "only reading the image is done another way"
    assert abs(difference[:, 0]).max() < 60


def test_the_device_times_what_the_board_counts(built, settings):
    folder, graphs, target, _ = built
    session = tuple(sorted((dict(target.session) | settings).items()))
    runner = plugins.get("backends", "mcu_c").load(folder, graphs, msgspec.structs.replace(target, session=session))
    device = plugins.get("devices", "serial_m7")
    x = {"pixel_values": np.zeros((1, 3, 16, 16), np.float32)}
    [latency] = device.time([Job("engine", runner, x)], seconds=1.0, seed=0)
    assert (latency.kind, latency.n) == ("modelled", 5)  # an emulated board counts no cycles
    [emulated] = plugins.get("devices", "qemu_m7").time([Job("engine", runner, x)], seconds=1.0, seed=0)
    assert latency.value == pytest.approx(emulated.value, rel=1e-3)


def test_a_board_that_computes_something_else_is_refused(built, monkeypatch):
    folder, graphs, target, _ = built
    session = tuple(sorted((dict(target.session) | {"port": "/dev/no", "make": "firmware_uart.elf"}).items()))
    runner = plugins.get("backends", "mcu_c").load(folder, graphs, msgspec.structs.replace(target, session=session))

    def wrong(folder, settings, samples):
        found = toolchain.run_emulated(folder, CORES["cortex-m7"], samples)
        found.outputs[0, 0] ^= 1
        return found

    monkeypatch.setattr(serial_line, "run", wrong)
    device = plugins.get("devices", "serial_m7")
    with pytest.raises(UnsupportedError, match="engine gives other outputs on the board than on this computer"):
        device.time([Job("engine", runner, {"pixel_values": np.zeros((1, 3, 16, 16), np.float32)})], seconds=0, seed=0)


class Board(threading.Thread):
    """The firmware's end of a line, as a test wants it: answers the first knock with `says`, then takes what comes."""

    def __init__(self, says: bytes) -> None:
        super().__init__(daemon=True)
        self.master, slave = pty.openpty()
        self.port, self.says, self._slave = os.ttyname(slave), says, slave
        self.start()

    def run(self) -> None:
        while os.read(self.master, 1) != b"S":
            pass
        os.write(self.master, self.says)


@pytest.mark.parametrize(
    ("says", "message"),
    [
        (b"boot 1.2\nnascompile\nE\x5f\0\0\0", "status 95: the samples end in the middle of one"),
        (b"nascompile\nX\x5f\0\0\0", "noise on"),
        (b"nascompile\nO\x08\0\0\0abc", "fell silent after 3 of 8 bytes"),
        (b"garbage", "nothing answers"),
        (b"nascompile\nO\x04\0\0\0abcdE\0\0\0\0", "wrote no results"),
    ],
)
def test_a_board_that_does_not_answer_well_is_refused(says, message):
    board = Board(says)
    with pytest.raises(UnsupportedError, match=message):
        serial_line.talk(board.port, 115200, np.zeros((1, 4), np.int8), silence=0.6)


class Chatter(Board):
    """Says one thing after the other, and never its word."""

    def run(self) -> None:
        for _ in range(400):  # longer than anybody should listen
            os.write(self.master, b"x")
            time.sleep(0.01)


def test_a_board_that_never_stops_talking_is_given_up():
    began = time.monotonic()
    with pytest.raises(UnsupportedError, match="nothing answers"):
        serial_line.talk(Chatter(b"").port, 115200, np.zeros((1, 4), np.int8), silence=0.5)
    assert time.monotonic() - began < 2, "it talks for four seconds"


class Unplugged(Board):
    """Goes away in the middle of a frame."""

    def run(self) -> None:
        super().run()
        os.close(self._slave)
        os.close(self.master)


def test_a_board_that_is_unplugged_is_refused():
    board = Unplugged(b"nascompile\nO\x08")
    with pytest.raises(UnsupportedError, match=r"is gone|was closed") as caught:
        serial_line.talk(board.port, 115200, np.zeros((1, 4), np.int8), silence=5)
    assert board.port in caught.value.message


def test_what_the_system_says_of_a_lost_line_is_said():
    master, slave = pty.openpty()
    os.close(master)
    line = serial_line._Line(slave, "/dev/ttyACM7", 0.5)
    with pytest.raises(UnsupportedError, match="/dev/ttyACM7 is gone: Input/output error"):
        line.reach()
    os.close(slave)


@pytest.mark.parametrize(("make", "modelled"), [("firmware_uart.elf", True), ("firmware_board.elf BOARD=mine.c", False)])
def test_counted_instructions_are_not_compared_with_cycles(make, modelled):
    device, session = plugins.get("devices", "serial_m7"), (("make", make), ("port", "/dev/null"))
    target = Target(device="mine", backend="mcu_c", workload=Workload(), session=session)
    must = dict(device.environment(target, ()).must_match)
    assert must["counted"] == ("instructions in QEMU" if modelled else "cycles of the core")
    assert must.get("modelled", "") == (CYCLE_MODEL if modelled else "")
    assert not device.deterministic, "a core with caches"


def test_settings_that_cannot_be_meant(tmp_path):
    with pytest.raises(UnsupportedError, match="needs a port and a make"):
        serial_line.Settings.of({})
    with pytest.raises(UnsupportedError, match="baud = fast"):
        serial_line.Settings.of({"port": "p", "make": "m", "baud": "fast"})
    with pytest.raises(UnsupportedError, match="cannot open /nowhere"):
        serial_line.talk("/nowhere", 115200, np.zeros((1, 4), np.int8))
    with pytest.raises(UnsupportedError, match="is no serial line"):
        serial_line.talk(str(_file(tmp_path)), 115200, np.zeros((1, 4), np.int8))
    with pytest.raises(UnsupportedError, match="the flash command failed with status 3"):
        serial_line.flash(tmp_path, serial_line.Settings("p", "sh -c 'exit 3'", "firmware_board.elf"))
    with pytest.raises(UnsupportedError, match="cannot be run"):
        serial_line.flash(tmp_path, serial_line.Settings("p", "no-such-flasher {elf}", "firmware_board.elf"))


def _file(folder: Path) -> Path:
    (folder / "file").write_text("")
    return folder / "file"

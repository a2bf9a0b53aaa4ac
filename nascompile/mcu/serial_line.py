"""A board on a serial line: flash it by the user's own command, send samples, read results (the protocol stands in firmware/io_uart.c)."""

from __future__ import annotations

import os
import select
import shlex
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nascompile.errors import UnsupportedError
from nascompile.mcu import toolchain
from nascompile.mcu.project import PRODUCTS

WORD = b"nascompile\n"
EMULATED = "firmware_uart.elf"
"""What `make` builds for QEMU's board; everything else has the cycle counter of the core."""
KNOCK = 0.2
"""Seconds between two attempts to reach the board."""
SILENCE = 120.0
"""Seconds without a byte after which nobody waits any longer."""


@dataclass(frozen=True)
class Settings:
    """Session settings of a profile, `[session]`."""

    port: str
    flash_command: str
    """Writes the firmware; `{elf}` and `{folder}` stand for what was built. Empty: it was flashed by hand."""
    make: str
    """Arguments of make that build it: `firmware_board.elf BOARD=/home/me/board.c`."""
    baud: int = 115200

    @classmethod
    def of(cls, session: Mapping[str, str]) -> Settings:
        """UnsupportedError naming what is missing or no speed."""
        if missing := [name for name in ("port", "make") if not session.get(name)]:
            raise UnsupportedError(
                f"a board on a serial line needs a {' and a '.join(missing)}",
                hint='[session] port = "/dev/ttyACM0", make = "firmware_board.elf BOARD=/home/me/board.c", flash_command = "st-flash …"',
            )
        baud = session.get("baud", "115200")
        if not baud.isdecimal():
            raise UnsupportedError(f"not a speed of a serial line: baud = {baud}", hint='baud = "115200"')
        return cls(session["port"], session.get("flash_command", ""), session["make"], int(baud))


def run(folder: Path, settings: Settings, samples: npt.NDArray[np.int8]) -> toolchain.Run:
    """Build, flash, and what the board said about the samples (n, …); UnsupportedError where it does not answer."""
    with tempfile.TemporaryDirectory(prefix="nascompile-board-") as scratch:
        project = Path(scratch) / "project"
        shutil.copytree(folder, project, ignore=shutil.ignore_patterns(*PRODUCTS))  # an engine's folder stays as it was hashed
        toolchain.make(project, *shlex.split(settings.make))
        flash(project, settings)
        return talk(settings.port, settings.baud, samples)


def flash(project: Path, settings: Settings) -> None:
    """Run the user's command; UnsupportedError with what it said."""
    if not settings.flash_command:
        return
    elf = project / shlex.split(settings.make)[0]
    words = [word.format(elf=elf, folder=project) for word in shlex.split(settings.flash_command)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    except OSError as error:
        raise UnsupportedError(f"the flash command cannot be run: {error}", detail=shlex.join(words)) from error
    if done.returncode:
        said = f"{shlex.join(words)}\n{done.stderr[-1000:]}"
        raise UnsupportedError(f"the flash command failed with status {done.returncode}", detail=said)


def talk(port: str, baud: int, samples: npt.NDArray[np.int8], silence: float = SILENCE) -> toolchain.Run:
    """What the firmware answers to the samples; UnsupportedError if it stays silent, ends early or says what cannot be."""
    pending = memoryview(np.ascontiguousarray(samples, dtype=np.int8).tobytes())
    results = bytearray()
    handle = _open(port, baud)
    try:
        line = _Line(handle, port, silence)
        line.reach()
        while True:
            kind, value = line.frame()
            if kind == b"I":
                line.write(b"Y" + bytes(pending[:value]) if len(pending) >= value else b"N")
                pending = pending[value:] if len(pending) >= value else pending
            elif kind == b"O":
                results += line.read(value)
            elif kind == b"E" and value == 0:
                return toolchain.parse(bytes(results), len(samples))
            elif kind == b"E":
                raise UnsupportedError(f"the firmware ended with status {value}: {toolchain.EXITS.get(value, 'unknown')}")
            else:
                raise UnsupportedError(f"noise on {port}: {kind!r}", hint="is the speed of both ends the same?")
    finally:
        os.close(handle)


class _Line:
    def __init__(self, handle: int, port: str, silence: float) -> None:
        self.handle, self.port, self.silence = handle, port, silence

    def reach(self) -> None:
        """Knock until the board says its word, whatever else it says meanwhile."""
        seen, began = b"", time.monotonic()
        while not seen.endswith(WORD):
            if time.monotonic() - began > self.silence:
                said = f"last heard: {seen[-40:]!r}"
                raise UnsupportedError(f"nothing answers on {self.port}", detail=said, hint="is the firmware flashed, and the speed right?")
            self.write(b"S")
            knocked = time.monotonic()
            while not seen.endswith(WORD) and (left := knocked + KNOCK - time.monotonic()) > 0 and self.hears(left):
                seen += self.some(1)

    def frame(self) -> tuple[bytes, int]:
        """Kind and value."""
        data = self.read(5)
        return data[:1], struct.unpack("<I", data[1:])[0]

    def read(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            if not self.hears(self.silence):
                raise UnsupportedError(f"the board on {self.port} fell silent after {len(data)} of {count} bytes")
            data += self.some(count - len(data))
        return bytes(data)

    def hears(self, seconds: float) -> bool:
        """Whether there is something to read, or becomes so in that time."""
        return bool(select.select([self.handle], [], [], seconds)[0])

    def some(self, most: int) -> bytes:
        """What there is, a byte at least; UnsupportedError if the line was closed."""
        with self._plugged_in():
            if found := os.read(self.handle, most):
                return found
        raise UnsupportedError(f"{self.port} was closed")

    def write(self, data: bytes) -> None:
        while data:
            with self._plugged_in():
                data = data[os.write(self.handle, data) :]

    @contextmanager
    def _plugged_in(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UnsupportedError(f"{self.port} is gone: {error.strerror}", hint="is the board still plugged in?") from error


def _open(port: str, baud: int) -> int:
    """A raw serial line: eight bits, no parity, no flow control; UnsupportedError if it cannot be opened."""
    import termios
    import tty

    try:
        handle = os.open(port, os.O_RDWR | os.O_NOCTTY)
    except OSError as error:
        hint = "is the board plugged in, and may you use the port?"
        raise UnsupportedError(f"cannot open {port}: {error.strerror}", hint=hint) from error
    try:
        tty.setraw(handle)
        attributes = termios.tcgetattr(handle)
        speed = getattr(termios, f"B{baud}", None)
        if speed is None:
            raise UnsupportedError(f"not a speed of a serial line: {baud}", hint="115200 is one")
        attributes[4] = attributes[5] = speed
        attributes[2] |= termios.CLOCAL | termios.CREAD
        termios.tcsetattr(handle, termios.TCSANOW, attributes)
    except termios.error as error:
        os.close(handle)
        raise UnsupportedError(f"{port} is no serial line: {error}") from error
    except UnsupportedError:
        os.close(handle)
        raise
    return handle

"""A device over the user's own ssh: a kit is copied there, run so that no dropped connection ends it, and its results are fetched.

Nothing is kept open that matters: every step asks first what is there, so that any of them can be repeated after a connection was lost
or this process was killed. ssh is called with lists of arguments; what the device's shell reads is quoted by `shlex`.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import subprocess
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nascompile import kit
from nascompile.devices.cpu import ISA
from nascompile.errors import RecordError, UnsupportedError
from nascompile.progress import Progress
from nascompile.records import file_digest
from nascompile.targets import address

CONFIG = "NASCOMPILE_SSH_CONFIG"
"""Environment variable: an ssh configuration file in place of the user's own (`ssh -F`)."""
OPTIONS = ("BatchMode=yes", "ConnectTimeout=15", "ServerAliveInterval=15", "ServerAliveCountMax=4")
"""No question is asked that nobody would answer; a connection that has died is noticed within a minute."""
FOLDER = ".cache/nascompile/kits"
"""Under the home folder there."""
PAUSES = (1, 2, 4, 8, 15, 30, 30, 30, 60, 60, 60, 60)
"""Seconds before each further try to reconnect: six minutes in all."""
LOST, NO_COMMAND = 255, (126, 127)
"""Exit status of ssh itself where there is no connection; of a shell that finds no such command."""
BOOT = "import sys;b=sys.stdin.buffer;n=int(b.readline());exec(compile(b.read(n),'agent','exec'),{'__name__':'__main__'})"
"""Runs the agent, whose length and source come first on stdin."""


@dataclass(frozen=True)
class Found:
    """What is at the other end."""

    machine: str
    isa: tuple[str, ...]
    device: tuple[tuple[str, str], ...]
    """What a table of it must match."""
    versions: tuple[tuple[str, str], ...]


class Connection:
    """Commands on a device; tries again where the connection was lost, once it has been there."""

    def __init__(self, transport: str, python: str, progress: Progress) -> None:
        self.address, self.python, self.progress = address(transport), python, progress
        self._reached = False
        self._agent = Path(__file__).with_name("remote_agent.py").read_bytes()
        if shutil.which("ssh") is None:
            raise UnsupportedError("ssh is not installed here", hint="install OpenSSH's client (Debian: apt install openssh-client)")

    def probe(self, backend: str) -> Found:
        """What the device is; UnsupportedError naming the packages it lacks."""
        template = kit.TEMPLATE.read_text(encoding="utf-8")
        found = self._answer(self.ask("probe", backend, "cpu", payload=json.dumps({"template": template, "isa": ISA}).encode()))
        if lacking := found["lacking"]:
            raise UnsupportedError(
                f"{self.address} has no {' and no '.join(lacking)} for {found['executable']} (Python {found['python']})",
                hint=f"ssh {self.address.host} {shlex.join([found['executable'], '-m', 'pip', 'install', *lacking])}; "
                "or name the Python that has them in the device's profile: python = \"venv/bin/python\"",
            )  # fmt: skip
        pairs = {name: tuple((str(a), str(b)) for a, b in found[name]) for name in ("device", "versions")}
        return Found(str(found["machine"]), tuple(map(str, found["isa"])), pairs["device"], pairs["versions"])

    def run(self, folder: Path, token: str = "") -> bytes:
        """Copy a kit there, run it to its end, fetch `results.json`.

        `token`: what was timed under another one does not count; under the same one, an interrupted run is gone on with.
        """
        manifest = folder / kit.MANIFEST
        place = f"{FOLDER}/{file_digest(manifest)[:16]}"
        self._copy(folder, place)
        while True:
            begun = self._answer(self.ask("start", place, token))
            self.progress.note(f"{self.address}: {'timing' if begun['started'] else 'is timing already'}, in ~/{place}")
            said = self._follow(place, int(begun["offset"]))
            if token in ("", begun["token"]):
                break  # else it was somebody else's, begun before: this one comes after it
        if results := self.ask("fetch", place):
            return results
        raise RecordError(
            f"the kit did not run to its end on {self.address}", detail="\n".join(said[-6:]),
            hint=f"the same command goes on with it; ~/{place}/run.log there says all",
        )  # fmt: skip

    def ask(self, verb: str, *arguments: str, payload: bytes = b"") -> bytes:
        """What a command prints; reconnects where the connection is lost."""
        for pause in (*PAUSES, None):
            done = subprocess.run(self._command(verb, *arguments), input=self._stdin(payload), capture_output=True, check=False)
            if done.returncode != LOST:
                self._reached = True
                self._check(done.returncode, done.stderr)
                return done.stdout
            self._wait(pause, done.stderr)
        raise AssertionError("the last pause is none, which raises")

    def _answer(self, content: bytes) -> dict[str, Any]:
        """What the agent said; UnsupportedError where something else was printed with it."""
        try:
            found = json.loads(content)
        except ValueError as error:
            raise UnsupportedError(
                f"{self.address} prints something of its own when a command is run there", detail=repr(content[:200]),
                hint="make its shell's start-up files silent for commands (.bashrc, .profile)",
            ) from error
        return dict(found)

    def _copy(self, folder: Path, place: str) -> None:
        """Send the files that are missing there or differ; after a lost connection those that did not arrive."""
        wanted = {p.relative_to(folder).as_posix(): file_digest(p) for p in sorted(folder.rglob("*")) if p.is_file()}
        for pause in (*PAUSES, None):
            there = self._answer(self.ask("list", place))
            missing = [name for name, sha in wanted.items() if there.get(name) != sha]
            if not missing:
                return
            size = sum((folder / name).stat().st_size for name in missing)
            self.progress.note(f"{self.address}: copying {len(missing)} of {len(wanted)} files, {size / 1e6:.1f} MB")
            archive = io.BytesIO()
            with tarfile.open(fileobj=archive, mode="w") as tar:
                for name in missing:
                    tar.add(folder / name, name)
            command, stdin = self._command("receive", place), self._stdin(archive.getvalue())
            done = subprocess.run(command, input=stdin, capture_output=True, check=False)
            if done.returncode == LOST:
                self._wait(pause, done.stderr)
            else:
                self._check(done.returncode, done.stderr)
        raise RecordError(f"files do not arrive whole on {self.address}", hint="is its disk full?")

    def _follow(self, place: str, offset: int) -> list[str]:
        """The log's lines as they are written, until the script there has ended."""
        said: list[str] = []
        pauses = iter((*PAUSES, None))
        while True:
            process = subprocess.Popen(
                self._command("follow", place, str(offset)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stderr is not None
            try:
                with process.stdin as stdin:
                    stdin.write(self._stdin(b""))
                for line in process.stdout:
                    if line.endswith(b"\n"):  # a part of a line is read again after reconnecting
                        offset += len(line)
                        said.append(_plain(line))
                        self.progress.note(f"  {said[-1]}")
                        pauses = iter((*PAUSES, None))
                error = process.stderr.read()
                code = process.wait()
            except BrokenPipeError:
                error, code = process.stderr.read(), process.wait()
            except KeyboardInterrupt:
                self.progress.note(f"{self.address}: goes on by itself; the same command fetches its results")
                raise
            finally:
                process.kill()
                process.wait()
                process.stdout.close()
                process.stderr.close()
            if code != LOST:
                self._check(code, error)
                return said
            self._wait(next(pauses), error)

    def _command(self, verb: str, *arguments: str) -> list[str]:
        options = [word for option in OPTIONS for word in ("-o", option)]
        config = os.environ.get(CONFIG)
        there = shlex.join([self.python, "-c", BOOT, verb, *arguments])
        return ["ssh", *(["-F", config] if config else []), *options, *self._place(), there]

    def _stdin(self, payload: bytes) -> bytes:
        return str(len(self._agent)).encode() + b"\n" + self._agent + payload

    def _check(self, code: int, error: bytes) -> None:
        """UnsupportedError for a command that failed there."""
        if code in NO_COMMAND:
            raise UnsupportedError(
                f"{self.address} has no {self.python}", detail=_plain(error),
                hint="install Python 3.9 or later there, or name it in the device's profile: python = \"venv/bin/python\"",
            )  # fmt: skip
        if code:
            raise UnsupportedError(f"a command failed on {self.address}: exit status {code}", detail=_plain(error)[-2000:])

    def _wait(self, pause: float | None, error: bytes) -> None:
        """Before the next try; UnsupportedError if there is none."""
        if not self._reached:
            raise UnsupportedError(
                f"cannot reach {self.address} by ssh", detail=_plain(error),
                hint=f"`{shlex.join(['ssh', '-o', 'BatchMode=yes', *self._place(), 'true'])}` must work without a question first",
            )  # fmt: skip
        if pause is None:
            raise UnsupportedError(
                f"the connection to {self.address} was lost, and {len(PAUSES)} tries did not bring it back", detail=_plain(error),
                hint="what was begun there goes on; the same command fetches it once the device can be reached",
            )  # fmt: skip
        self.progress.note(f"{self.address}: connection lost, trying again in {pause} s")
        time.sleep(pause)

    def _place(self) -> list[str]:
        where = ["-l", self.address.user] * bool(self.address.user) + ["-p", str(self.address.port)] * bool(self.address.port)
        return [*where, "--", self.address.host]


def _plain(text: bytes) -> str:
    """Printable, whatever a device says."""
    lines = text.decode("utf-8", errors="replace").strip().splitlines()
    return "\n".join("".join(c if c.isprintable() else "?" for c in line) for line in lines)

"""The other end of `remote.py`: sent over ssh with every command, run by the device's own Python, never stored there.

Reads what the command needs from stdin, prints JSON or raw bytes. The kit's folder and this process's lock on it are all that it touches.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tarfile
import time
from pathlib import Path, PurePosixPath
from typing import Any

LOG, LOCK, RESULTS, JOURNAL, TOKEN = "run.log", "agent.lock", "results.json", "results.jsonl", "agent.token"
OURS = (LOG, LOCK, RESULTS, JOURNAL, TOKEN, "results.lock")
"""What is in a kit's folder besides the kit."""


def main() -> None:
    verb, arguments = sys.argv[1], sys.argv[2:]
    verbs: dict[str, Any] = {"probe": probe, "list": listing, "receive": receive, "start": start, "follow": follow, "fetch": fetch}
    verbs[verb](*arguments)


def probe(backend: str, provider: str) -> None:
    """What this machine is: Python, packages, processor; with NumPy also what a table of it must match. Stdin: {template, isa}."""
    asked = json.load(sys.stdin)
    found: dict[str, Any] = {
        "python": platform.python_version(), "executable": sys.executable, "machine": platform.machine(),
        "lacking": [name for name in (backend, "numpy") if importlib.util.find_spec(name) is None],
    }  # fmt: skip
    if not found["lacking"]:
        script: dict[str, Any] = {"__name__": "run_kit", "__file__": "run_kit.py"}
        exec(compile(asked["template"], "run_kit.py", "exec"), script)
        found["device"] = script["device"](provider, asked["isa"])
        found["versions"] = [[backend, script["package_version"](backend)]]
        found["isa"] = script["isa"](script["cpuinfo"](), asked["isa"])
    print(json.dumps(found))


def listing(folder: str) -> None:
    """File of the kit ▸ SHA-256, for those that are here."""
    top = Path(folder)
    files = [p for p in sorted(top.rglob("*")) if p.is_file() and p.relative_to(top).as_posix() not in OURS]
    print(json.dumps({p.relative_to(top).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}))


def receive(folder: str) -> None:
    """Store the files of a tar archive on stdin, each whole or not at all."""
    top = Path(folder)
    with tarfile.open(fileobj=sys.stdin.buffer, mode="r|") as archive:
        for member in archive:
            name = PurePosixPath(member.name)
            if not member.isfile() or name.is_absolute() or ".." in name.parts:
                sys.exit(f"not a file of a kit: {member.name}")
            stream = archive.extractfile(member)
            assert stream is not None
            path = top / name
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.part")
            temporary.write_bytes(stream.read())
            os.replace(temporary, path)


def start(folder: str, token: str) -> None:
    """Start the script unless it is running, in a session of its own that outlives this one; where its log begins, and its token.

    A new token starts over: what the journal has was timed before somebody wanted to know how fast the machine is now.
    """
    top = Path(folder)
    begun = (top / TOKEN).read_text() if (top / TOKEN).is_file() else ""
    lock = (top / LOCK).open("w")
    log = top / LOG
    offset = log.stat().st_size if log.exists() else 0
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        print(json.dumps({"started": False, "offset": offset, "token": begun}))
        return
    if token and token != begun:
        (top / JOURNAL).unlink(missing_ok=True)
        (top / TOKEN).write_text(token)
    (top / RESULTS).unlink(missing_ok=True)  # of an earlier run, maybe with other versions; the journal has its times
    with log.open("ab") as output:
        subprocess.Popen(
            [sys.executable, "-u", "run_kit.py"], cwd=top, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True, pass_fds=[lock.fileno()],  # the lock is held for as long as the script lives
        )  # fmt: skip
    print(json.dumps({"started": True, "offset": offset, "token": token or begun}))


def follow(folder: str, offset: str) -> None:
    """The log from an offset on, until the script has ended."""
    top, position = Path(folder), int(offset)
    while True:
        running = held(top)  # before the log is read, so that its last lines are not missed
        with (top / LOG).open("rb") as stream:
            stream.seek(position)
            content = stream.read()
        position += len(content)
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
        if not running:
            return
        time.sleep(1.0)  # rarely: it takes time from what is being timed


def held(top: Path) -> bool:
    with (top / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def fetch(folder: str) -> None:
    """`results.json`; nothing if there is none."""
    path = Path(folder) / RESULTS
    if path.is_file():
        sys.stdout.buffer.write(path.read_bytes())


if __name__ == "__main__":
    main()

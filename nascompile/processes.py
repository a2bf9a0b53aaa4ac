"""Several processes of one command, as torchrun and `accelerate launch` start them: the first does the work, the others help it train."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from nascompile.errors import NascompileError, UnsupportedError

SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where launchers say how many processes they started."""
UNLIMITED = timedelta(days=365)
"""A search may take hours; the end of a process closes its connections, and that is noticed at once."""
ENDED, FAILED = 0, -1
"""In place of a message's length."""


@dataclass(eq=False)
class Team:
    """A process's place among those of its command."""

    rank: int = 0
    size: int = 1
    group: Any = None
    """Of torch.distributed, on the CPU, without a time limit; None for a process on its own."""
    apart: bool = False
    """Whether what needed all processes has not ended well, or not yet: the others are not waiting in `calls`."""

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @property
    def remark(self) -> str:
        """What is worth saying about how many there are; nothing about one that was meant to be one."""
        if self.size > 1:
            return f"{self.size} processes train together, the first does everything else"
        if "MASTER_ADDR" in os.environ and os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
            return "accelerate started one process: with `--cpu` it starts more only through mpirun, torchrun starts them itself"
        return ""

    def call(self, message: bytes) -> None:
        """Say something to the others, which wait for it in `calls`. NascompileError if one of them is gone."""
        with self.together():
            self._send(len(message), message)

    def calls(self) -> Iterator[bytes]:
        """What the first process says, until its work is done. NascompileError if it fails or dies."""
        import torch

        while True:
            with self.together():
                length = int(self._broadcast(torch.zeros(1, dtype=torch.int64)))
                content = self._broadcast(torch.zeros(max(0, length), dtype=torch.uint8))
            if length == FAILED:
                raise NascompileError("the first process of this command has failed", hint="its own message says why")
            if length == ENDED:
                return
            yield content.numpy().tobytes()

    @contextmanager
    def leading(self) -> Iterator[None]:
        """Around the work of the first process: the others hear how it ends, or in a training lose their connection to it."""
        try:
            yield
        except BaseException:
            if not self.apart:
                with suppress(RuntimeError):  # they may be gone
                    self._send(FAILED)
            raise
        with self.together():
            self._send(ENDED)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around what needs all processes: NascompileError if one of them is gone."""
        self.apart = True
        try:
            yield
            self.apart = False
        except RuntimeError as error:
            if self.size == 1 or not _connection(error):
                raise
            raise NascompileError(
                f"another of the {self.size} processes of this command has ended", detail=str(error).partition("\n")[0],
                hint="its own message says why; the same command continues from the last checkpoint",
            ) from error  # fmt: skip

    def _send(self, length: int, content: bytes = b"") -> None:
        if self.size > 1:
            import torch

            self._broadcast(torch.tensor([length]))
            self._broadcast(torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.zeros(0, dtype=torch.uint8))

    def _broadcast(self, tensor: Any) -> Any:
        import torch

        if tensor.numel():
            torch.distributed.broadcast(tensor, src=0, group=self.group)
        return tensor


ALONE = Team()


@functools.cache
def join() -> Team:
    """This process's place; a process that no launcher started is on its own. UnsupportedError if the processes cannot meet."""
    started = max(int(os.environ.get(name) or 1) for name in SIZES)
    if started == 1:
        return ALONE
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
    if state.num_processes != started:
        raise UnsupportedError(
            f"a launcher started {started} processes, accelerate found {state.num_processes}",
            hint="start them with torchrun or `accelerate launch`; ACCELERATE_USE_CPU=true trains without accelerators",
        )
    group = torch.distributed.new_group(backend="gloo", timeout=UNLIMITED)
    return Team(state.process_index, state.num_processes, group)


def leave(code: object) -> None:
    """End this process if it is one of several; its neighbours may be gone, and then gloo's threads can abort the interpreter's own end."""
    if join.cache_info().currsize and join().size > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


def _connection(error: RuntimeError) -> bool:
    """Whether it is about the others: gloo has no error class of its own."""
    import torch

    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)

"""Every expected failure: a message that names the value, a detail line, and one next step."""

from __future__ import annotations


class NascompileError(Exception):
    """An expected failure: printed without a traceback, exit status 1."""

    def __init__(self, message: str, *, hint: str = "", detail: str = "") -> None:
        super().__init__(message)
        self.message, self.hint, self.detail = message, hint, detail

    def __str__(self) -> str:
        text = self.message
        if self.detail:
            text += "\n" + "\n".join(f"  {line}" for line in self.detail.splitlines())
        if self.hint:
            text += f"\n\nhint: {self.hint}"
        return text


class RecordError(NascompileError):
    """A file of ours that is damaged, of another version, or not what its name says."""


class RecipeError(NascompileError):
    """A setting that cannot be meant: unknown name, value out of range, two that exclude each other."""


class DataError(NascompileError):
    """Labelled data that cannot be used as asked, or a split read before its time."""


class ModelError(NascompileError):
    """A model that cannot be loaded, is not of a known family, or is not stored as safetensors."""


class BudgetError(NascompileError):
    """No candidate meets the budget; the message names the nearest one."""


class TableError(NascompileError):
    """A latency table that is missing, incomplete, or belongs to another machine."""


class UnsupportedError(NascompileError):
    """A device, backend, precision or plug-in that cannot do what was asked, and why."""

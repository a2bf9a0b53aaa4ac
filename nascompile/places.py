"""Where profiles and latency tables are looked for, and where new ones go.

Explicit folder > ./<kind> > the user's data folder > packaged copies. Nothing is ever written beside the package.
"""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from nascompile.errors import UnsupportedError

PROFILES, TABLES = "profiles", "latency_tables"


def folders(kind: str, explicit: Path | None = None) -> tuple[Path, ...]:
    """Folders to read, best first; they need not exist."""
    return (*_own(kind, explicit), *_packaged(kind))


def is_packaged(kind: str, path: Path) -> bool:
    """Whether a file came with the package."""
    return any(path.resolve().is_relative_to(folder) for folder in _packaged(kind))


def writable(kind: str, explicit: Path | None = None) -> Path:
    """The first folder that can be written (not created yet); UnsupportedError naming all that were tried."""
    tried = _own(kind, explicit)
    for folder in tried:
        if _can_write(folder):
            return folder
    raise UnsupportedError(
        f"no folder for {kind} can be written", detail="\n".join(map(str, tried)), hint=f"name one that can: --{kind.split('_')[-1]} FOLDER"
    )


def _own(kind: str, explicit: Path | None) -> tuple[Path, ...]:
    standard = (Path.cwd() / kind, platformdirs.user_data_path("nascompile") / kind)
    return standard if explicit is None else (explicit, *standard)


def _packaged(kind: str) -> tuple[Path, ...]:
    package = Path(__file__).resolve().parent
    # a checkout keeps them beside the package; the parent of an installed package belongs to everybody
    checkout = (package.parent / kind,) if (package.parent / "pyproject.toml").exists() else ()
    return (*checkout, package / kind)


def _can_write(folder: Path) -> bool:
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)

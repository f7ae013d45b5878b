"""Public-domain book text that installs from a package registry: six novels by Jane Austen.

Source: Debian's `r-cran-janeaustenr`. `novel("emma")` downloads the package with apt-get on first use, unpacks
it (no R needed) and returns the text; `rdata` reads the R objects.
"""

from __future__ import annotations

import subprocess
import tempfile
import warnings
import zlib
from pathlib import Path

import rdata

from certjax.model import cache_directory

NOVELS = ("emma", "mansfieldpark", "northangerabbey", "persuasion", "prideprejudice", "sensesensibility")
PACKAGE = "r-cran-janeaustenr"


def novel(name: str) -> str:
    """Text of one of NOVELS."""
    if name not in NOVELS:
        raise ValueError(f"unknown novel {name!r}; choose one of {', '.join(NOVELS)}.")
    stored = cache_directory() / "texts" / f"{name}.txt"
    if not stored.exists():
        stored.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            for title, text in _unpack(Path(scratch)).items():
                (stored.parent / f"{title}.txt").write_text(text, encoding="utf-8")
    return stored.read_text(encoding="utf-8")


def conversation(name: str, tokenizer) -> str:
    """A long chat in the model's template: passages of a novel as the two sides' messages."""
    paragraphs = [p.replace("\n", " ") for p in novel(name).split("\n\n") if 80 < len(p) < 600][:400]
    sides = ("user", "assistant")
    return tokenizer.chat([{"role": sides[i % 2], "content": p} for i, p in enumerate(paragraphs)])


def _unpack(scratch: Path) -> dict[str, str]:
    fetched = subprocess.run(["apt-get", "download", PACKAGE], cwd=scratch, capture_output=True, text=True)
    if fetched.returncode:
        raise RuntimeError(f"apt-get download {PACKAGE} failed (run apt-get update first?): {fetched.stderr.strip()}")
    subprocess.run(["dpkg", "-x", next(scratch.glob("*.deb")), scratch / "files"], check=True)
    data = scratch / "files/usr/lib/R/site-library/janeaustenr/data"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rdata guesses the file type, rightly
        index = rdata.conversion.convert(rdata.parser.parse_data((data / "Rdata.rdx").read_bytes()))
        blob = (data / "Rdata.rdb").read_bytes()
        texts = {}
        for title, (offset, size) in index["variables"].items():
            # Each object: 4 bytes of length, then a zlib stream of the serialized character vector.
            stream = zlib.decompress(blob[int(offset) + 4 : int(offset) + int(size)])
            texts[str(title)] = "\n".join(rdata.conversion.convert(rdata.parser.parse_data(stream)))
    return texts

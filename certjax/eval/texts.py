"""Texts to evaluate on: six public-domain novels by default, the user's files, or a data set of Hugging Face's."""

from __future__ import annotations

import os
import subprocess
import tempfile
import warnings
import zlib
from pathlib import Path

from certjax.errors import InvalidArgumentError
from certjax.model import cache_directory

NOVELS = ("emma", "mansfieldpark", "northangerabbey", "persuasion", "prideprejudice", "sensesensibility")
"""Titles of the corpus "austen"."""

PACKAGE = "r-cran-janeaustenr"


def corpus(name: str | os.PathLike = "austen") -> dict[str, str]:
    """Texts by title, always in the same order.

    Parameters
    ----------
    name
        - "austen": the novels NOVELS, from the Debian package r-cran-janeaustenr. `apt-get` downloads it on first
          use (R is not needed); the texts are kept in the cache directory.
        - A `.txt` file, or a directory of them: UTF-8, one text a file, titled and sorted by file name.
        - "hf:NAME[:SUBSET[:SPLIT[:FIELD]]]": a data set that the package `datasets` loads, one text a row, titled
          by number. A part may be left empty; SPLIT is "test" and FIELD is "text" by default.

    Raises
    ------
    InvalidArgumentError
        If there is no such corpus, it holds no text, or what it takes to read it is missing.
    """
    if str(name) == "austen":
        texts = _novels()
    elif str(name).startswith("hf:"):
        texts = _dataset(str(name))
    else:
        texts = _files(Path(name))
    texts = {title: text for title, text in texts.items() if text.strip()}
    if not texts:
        raise InvalidArgumentError(f"corpus {str(name)!r} holds no text; choose one with text that is not blank.")
    return texts


def _novels() -> dict[str, str]:
    folder = cache_directory() / "texts"
    files = {title: folder / f"{title}.txt" for title in NOVELS}
    if not all(file.exists() for file in files.values()):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            for title, text in _unpack(Path(scratch)).items():
                whole = Path(scratch) / f"{title}.txt"
                whole.write_text(text, encoding="utf-8")
                whole.replace(folder / whole.name)  # complete or not there, also for another process
    return {title: file.read_text(encoding="utf-8") for title, file in files.items()}


def _unpack(scratch: Path) -> dict[str, str]:
    try:
        import rdata
    except ImportError as error:
        raise InvalidArgumentError(
            'the corpus "austen" is stored as R data, read by the package rdata: pip install "certjax[eval]".'
        ) from error
    _debian("apt-get", "download", PACKAGE, cwd=scratch)
    _debian("dpkg", "-x", str(next(scratch.glob("*.deb"))), "files", cwd=scratch)
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


def _debian(*command: str, cwd: Path) -> None:
    try:
        ended = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
        problem = ended.stderr.strip() if ended.returncode else None
    except OSError as error:
        problem = str(error)
    if problem is not None:
        raise InvalidArgumentError(
            f'the corpus "austen" cannot be fetched: {" ".join(command[:3])} failed ({problem}). On Debian and Ubuntu, '
            "run `apt-get update` and try again; elsewhere, pass a .txt file or a directory of them."
        )


def _files(path: Path) -> dict[str, str]:
    if path.is_dir():
        files = sorted(path.glob("*.txt"))
    elif path.is_file():
        files = [path]
    else:
        raise InvalidArgumentError(
            f'no corpus {str(path)!r}: pass "austen", a .txt file, a directory of .txt files, or '
            '"hf:NAME[:SUBSET[:SPLIT[:FIELD]]]".'
        )
    return {file.stem: _read(file) for file in files}


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(f"{file} cannot be read ({error}); texts are stored as UTF-8.") from error


def _dataset(name: str) -> dict[str, str]:
    parts = name.removeprefix("hf:").split(":")
    path, subset, split, field = (parts + [""] * 3)[:4]
    if not path or len(parts) > 4:
        raise InvalidArgumentError(f"{name!r} names no data set; write it as hf:NAME[:SUBSET[:SPLIT[:FIELD]]].")
    try:
        import datasets
    except ImportError as error:
        raise InvalidArgumentError(f"{name!r} needs the package datasets: pip install datasets.") from error
    field = field or "text"
    try:
        rows = datasets.load_dataset(path, subset or None, split=split or "test")
    except Exception as error:  # network, name, subset, split: `datasets` has no common base for them
        raise InvalidArgumentError(
            f"{name!r} cannot be loaded ({error}); check name, subset and split, or pass a directory of .txt files."
        ) from error
    if field not in rows.column_names:
        raise InvalidArgumentError(
            f"{name!r} has no field {field!r}; its fields are {', '.join(rows.column_names)}: name one last."
        )
    return {str(number): text for number, text in enumerate(rows[field])}

"""One line of JSON a sample and mode: what was asked, what came back, what the certificate said."""

from __future__ import annotations

import dataclasses
import gzip
import json
import lzma
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from certjax.errors import InvalidArgumentError

SCHEMA = 1

_COMPRESSED = {b"\x1f\x8b": gzip.decompress, b"\xfd7zXZ\x00": lzma.decompress}
"""How a compressed file begins."""


@dataclasses.dataclass(frozen=True)
class CertificateSummary:
    """A sample's certificates, L layers and Hq heads over all decode steps.

    A bound is `e_total` of a head-step over the layer's norm (that of its concatenated heads over sqrt(Hq)). *Before*
    bounds speak of the quantized attempt, before heads went dense: what a monitor would see.

    Attributes
    ----------
    head_steps, rungs
        Head-steps, and how many ended on each of the rungs 0 to 4.
    bound_mean, bound_max, before_mean, before_max
        Over all head-steps.
    before_layer_mean, before_layer_max
        Over steps and layers, of the root mean square over a layer's heads.
    before_paper_mean, before_paper_max
        As `before_mean`, by the paper's bound.
    bytes_read, bytes_paged_in, bytes_dense
        A step, from the device and from the host; and what dense attention reads.
    checks_failed
        Head-steps in which a check failed.
    bound_by_head, dense_by_head, promoted_by_head
        `[L][Hq]`: mean bound before heads went dense; share of steps that went dense; mean blocks promoted (keys and
        values added up).
    """

    head_steps: int
    rungs: list[int]
    bound_mean: float
    bound_max: float
    before_mean: float
    before_max: float
    before_layer_mean: float
    before_layer_max: float
    before_paper_mean: float
    before_paper_max: float
    bytes_read: float
    bytes_paged_in: float
    bytes_dense: float
    checks_failed: int
    bound_by_head: list[list[float]]
    dense_by_head: list[list[float]]
    promoted_by_head: list[list[float]]


@dataclasses.dataclass(frozen=True)
class Record:
    """Attributes
    ----------
    benchmark, task, context, sample, seed
        Which sample it is ("ppl", "niah" or "ruler"; a corpus for "ppl"). With `mode` they name the line.
    mode
        Label of the mode, as given on the command line: "dense", "naive", "paper", "budget", or with options.
    config
        Hash of all that the outcome depends on: model, mode with its policy, task options, schema.
    versions
        The model's name; versions of certjax, jax, jaxlib and wonderwords; the device's kind.
    prompt_tokens, new_tokens
        Of the prompt; generated, or scored by teacher forcing.
    score
        Share of the references found, in [0, 1]; None for "ppl".
    prediction, references
        The continuation and what was looked for; None and [] for "ppl".
    token_nll, token_bound
        "ppl": nats of each scored token; the largest *before* bound of its step (None in dense mode).
    certificate
        None in dense mode.
    seconds
        Of decoding, with other work and compilation; no part of what is compared.
    """

    benchmark: str
    task: str
    context: int
    sample: int
    seed: int
    mode: str
    config: str
    versions: dict[str, str]
    prompt_tokens: int
    new_tokens: int
    score: float | None = None
    prediction: str | None = None
    references: list[str] = dataclasses.field(default_factory=list)
    token_nll: list[float] | None = None
    token_bound: list[float] | None = None
    certificate: CertificateSummary | None = None
    seconds: float = 0.0
    schema: int = SCHEMA

    @property
    def key(self) -> tuple:
        """What names the line in a file."""
        return (self.benchmark, self.task, self.context, self.sample, self.seed, self.mode, self.config)

    @property
    def nll(self) -> float:
        """Mean nats a token of a "ppl" record."""
        return sum(self.token_nll) / len(self.token_nll)

    def to_json(self) -> str:
        """A line without its end; floats to six digits, infinities as "Infinity"."""
        return json.dumps(_rounded(dataclasses.asdict(self)))

    @classmethod
    def from_json(cls, line: str | bytes) -> Record:
        """The inverse of `to_json`."""
        of = json.loads(line)
        summary = of.pop("certificate")
        return cls(**of, certificate=None if summary is None else CertificateSummary(**summary))


def read(path: Path) -> Iterator[Record]:
    """Records of a file, plain or compressed by gzip or xz. A last line that was cut off by a kill is passed over.

    Raises
    ------
    InvalidArgumentError
        If a line is no record, or of another schema, or the file cannot be decompressed.
    """
    whole = path.read_bytes()
    for start, decompress in _COMPRESSED.items():
        if whole.startswith(start):
            try:
                whole = decompress(whole)
            except (OSError, EOFError, ValueError, lzma.LZMAError) as error:
                raise InvalidArgumentError(f"{path} cannot be decompressed ({error}).") from error
            break
    for number, line in enumerate(whole.splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            return
        try:
            record = Record.from_json(line)
        except (ValueError, TypeError, KeyError) as error:
            raise InvalidArgumentError(f"{path}:{number} is no record of `certjax eval` ({error}).") from error
        if record.schema != SCHEMA:
            raise InvalidArgumentError(f"{path}:{number} has schema {record.schema}; this version reads {SCHEMA}.")
        yield record


def is_compressed(start: bytes) -> bool:
    """By the first bytes of a file."""
    return start.startswith(tuple(_COMPRESSED))


def repair(path: Path) -> None:
    """Cut off a last line that a kill left incomplete, so that records can be appended. No file is no error."""
    if not path.exists():
        return
    whole = path.read_bytes()
    end = whole.rfind(b"\n") + 1
    if end < len(whole):
        with path.open("r+b") as file:
            file.truncate(end)


def write(path: Path, records: Iterable[Record]) -> None:
    """Append records."""
    with path.open("a", encoding="utf-8") as file:
        for record in records:
            file.write(record.to_json() + "\n")


def _rounded(x: Any) -> Any:
    if isinstance(x, float):
        return float(f"{x:.6g}")
    if isinstance(x, dict):
        return {k: _rounded(v) for k, v in x.items()}
    if isinstance(x, list):
        return [_rounded(v) for v in x]
    return x

"""Tier-1 formats by name. A new format is one file and one line here; the tests pick it up."""

from __future__ import annotations

from certjax.codecs.base import Annotations, Codec, annotate, fingerprint
from certjax.codecs.int8_int4 import Int8Int4
from certjax.errors import InvalidArgumentError

REGISTRY: dict[str, type] = {"int8_int4": Int8Int4}


def make_codec(name: str, **options) -> Codec:
    """The codec registered under `name`, built with its own options.

    Raises
    ------
    InvalidArgumentError
        If no codec has that name.
    """
    if name not in REGISTRY:
        raise InvalidArgumentError(f"unknown codec {name!r}; available: {', '.join(sorted(REGISTRY))}.")
    return REGISTRY[name](**options)


__all__ = ["Annotations", "Codec", "REGISTRY", "annotate", "fingerprint", "make_codec"]

"""Tier-1 formats by name. A new format is one file and one line here; the tests pick it up."""

from __future__ import annotations

import dataclasses

from certjax.codecs.base import Annotations, Centres, Codec, annotate, fingerprint
from certjax.codecs.int8_int4 import Int8Int4
from certjax.codecs.planes import Planes
from certjax.errors import InvalidArgumentError

REGISTRY: dict[str, type] = {"int8_int4": Int8Int4, "planes": Planes}


def make_codec(name: str, **options) -> Codec:
    """The codec registered under `name`, built with those of the options that it has.

    Raises
    ------
    InvalidArgumentError
        If no codec has that name.
    """
    if name not in REGISTRY:
        raise InvalidArgumentError(f"unknown codec {name!r}; available: {', '.join(sorted(REGISTRY))}.")
    codec = REGISTRY[name]
    own = {field.name for field in dataclasses.fields(codec) if field.init}
    return codec(**{k: v for k, v in options.items() if k in own})


__all__ = ["Annotations", "Centres", "Codec", "REGISTRY", "annotate", "fingerprint", "make_codec"]

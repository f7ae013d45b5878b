"""Tier-1 formats by name. A new format is one file and one line here; the tests pick it up."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

from certjax.codecs.affine import Affine
from certjax.codecs.base import Annotations, Codec, Doubt, HeadStats, annotate, decode_keys, decode_values, fingerprint
from certjax.codecs.fp8 import Fp8
from certjax.codecs.keys_only import KeysOnly
from certjax.codecs.planes import Planes
from certjax.errors import InvalidArgumentError

REGISTRY: dict[str, Callable[..., Codec]] = {
    "int8_int4": functools.partial(Affine, "int8_int4"),
    "int8_fp16": KeysOnly,
    "int8_int8": functools.partial(Affine, "int8_int8", value_bits=8),
    "kivi_int4": functools.partial(Affine, "kivi_int4", key_bits=4, value_bits=4, group_size=32),
    "kivi_int2": functools.partial(Affine, "kivi_int2", key_bits=2, value_bits=2, group_size=32),
    "fp8_e4m3": Fp8,
    "planes": Planes,
}


def make_codec(name: str, **options) -> Codec:
    """The codec registered under `name`, built with those of the options that it has and that are not None.

    Raises
    ------
    InvalidArgumentError
        If no codec has that name.
    """
    if name not in REGISTRY:
        raise InvalidArgumentError(f"unknown codec {name!r}; available: {', '.join(sorted(REGISTRY))}.")
    build = REGISTRY[name]
    kind = build.func if isinstance(build, functools.partial) else build
    own = {field.name for field in dataclasses.fields(kind) if field.init}
    return build(**{k: v for k, v in options.items() if k in own and v is not None})


__all__ = [
    "REGISTRY",
    "Annotations",
    "Codec",
    "Doubt",
    "HeadStats",
    "annotate",
    "decode_keys",
    "decode_values",
    "fingerprint",
    "make_codec",
]

"""Modes as they are written on a command line: a preset, and the fields of its policy that differ.

    dense    naive    paper    budget    budget:tolerance=0.02,key_planes=8+4    paper:codec=int8_int8,canary=false
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any

from certjax.codecs import REGISTRY
from certjax.errors import InvalidArgumentError
from certjax.plugs import Mode
from certjax.policy import Policy

PRESETS: dict[str, Callable[..., Policy] | None] = {
    "dense": None,
    "naive": Policy.observe,
    "paper": Policy.paper,
    "budget": Policy.budget,
}
"""Mode by name -> preset of its policy. "naive" is run with its certificate, which changes nothing but a head-step in
which a check failed: that one is dense, and counted as such."""

_NAIVE_HAS_NO = ("ranking_depth", "eps_guard", "canary", "exploration", "seed")
_OF_PAPER = ("tau_cov", "k_min", "k_max", "v_tol", "rung1_threshold", "rung1_multiplier")
_OF_BUDGET = ("tolerance", "relative_to", "skip_values", "host_price", "allotment", "margin", "max_promoted")
_WITHOUT_EFFECT = {"naive": (*_NAIVE_HAS_NO, *_OF_PAPER, *_OF_BUDGET), "paper": _OF_BUDGET, "budget": _OF_PAPER}
_OF_CODEC = (
    "group_size", "key_metadata", "key_planes", "value_planes", "refine", "rotate", "fp8_scale",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class EvalMode:
    """A way to decode.

    Attributes
    ----------
    label
        As it was written; what a record's `mode` holds.
    kind
        Mode of the attention plug: "dense" or "certified".
    policy
        Not read where `kind` is "dense".
    """

    label: str
    kind: Mode
    policy: Policy

    def to_dict(self) -> dict[str, Any]:
        """What an outcome depends on: the same for two labels that mean the same."""
        return {"kind": self.kind, "policy": None if self.kind == "dense" else dataclasses.asdict(self.policy)}


def parse_mode(text: str) -> EvalMode:
    """Read `NAME` or `NAME:field=value[,field=value...]`.

    Values by the type of the field: `0.02`, `128`, `true`, `none`, a name, and integers joined by `+` for a tuple.

    Raises
    ------
    InvalidArgumentError
        On an unknown name or field, a value of another type, a field without effect in the mode, or a policy that does
        not hold together.
    """
    label = text.strip()
    name, colon, rest = label.partition(":")
    if name not in PRESETS:
        raise InvalidArgumentError(f"mode {label!r}: unknown name {name!r}; choose one of {', '.join(PRESETS)}.")
    if name == "dense":
        if colon:
            raise InvalidArgumentError(f"mode {label!r}: dense attention has no options; write 'dense'.")
        return EvalMode(label, "dense", Policy.observe())
    options = _options(label, name, rest) if colon else {}
    try:
        policy = PRESETS[name](**options)
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"mode {label!r}: {error}") from error
    own = {field.name for field in dataclasses.fields(policy.make_codec())}
    for field in options:
        if field in _OF_CODEC and field not in own:
            raise InvalidArgumentError(f"mode {label!r}: {field} is no option of codec={policy.codec}; leave it out.")
    return EvalMode(label, "certified", policy)


def parse_modes(texts: Iterable[str]) -> tuple[EvalMode, ...]:
    """`parse_mode` of each.

    Raises
    ------
    InvalidArgumentError
        As `parse_mode`, if none is given, or one is given twice.
    """
    modes = tuple(parse_mode(text) for text in texts)
    if not modes:
        raise InvalidArgumentError(f"no mode is given; choose from {', '.join(PRESETS)}.")
    labels = [mode.label for mode in modes]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise InvalidArgumentError(f"mode {twice[0]!r} is given twice.")
    return modes


def _options(label: str, name: str, text: str) -> dict[str, Any]:
    fields, options = _fields(), {}
    for item in text.split(","):
        field, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not field:
            raise InvalidArgumentError(f"mode {label!r}: {item!r} is not of the form field=value.")
        if field not in fields:
            raise InvalidArgumentError(f"mode {label!r}: unknown field {field!r}; choose from {', '.join(fields)}.")
        if field in options:
            raise InvalidArgumentError(f"mode {label!r}: {field} is given twice.")
        if field in _WITHOUT_EFFECT[name]:
            raise InvalidArgumentError(f"mode {label!r}: {field} has no effect in mode {name}; leave it out.")
        try:
            options[field] = _value(fields[field], value)
        except ValueError:
            allowed = _allowed(fields[field])
            raise InvalidArgumentError(f"mode {label!r}: {field} must be {allowed}, got {value!r}.") from None
    return options


@functools.cache
def _fields() -> dict[str, Any]:
    """Fields of `Policy` that a mode may set, with their types; the mode's name stands for `kind`."""
    hints = typing.get_type_hints(Policy)
    types_ = {field.name: hints[field.name] for field in dataclasses.fields(Policy) if field.name != "kind"}
    return {**types_, "codec": typing.Literal[tuple(sorted(REGISTRY))]}


def _value(kind: Any, text: str) -> Any:
    """`text` as a value of type `kind`; ValueError if it is none."""
    origin, members = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        if text not in members:
            raise ValueError(text)
        return text
    if origin is tuple:
        return tuple(int(part) for part in text.split("+"))
    if origin in (types.UnionType, typing.Union):
        (inner,) = (member for member in members if member is not types.NoneType)
        return None if text.lower() == "none" else _value(inner, text)
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    return kind(text)


def _allowed(kind: Any) -> str:
    origin, members = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return f"one of {', '.join(members)}"
    if origin is tuple:
        return "integers joined by +, such as 8+4"
    if origin in (types.UnionType, typing.Union):
        (inner,) = (member for member in members if member is not types.NoneType)
        return f"{_allowed(inner)}, or none"
    return {bool: "true or false", int: "an integer", float: "a number"}[kind]

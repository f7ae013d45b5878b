"""What an argument must be, said where it is given rather than where it does not fit."""

from __future__ import annotations

import operator
from typing import Any

from certjax.errors import InvalidArgumentError


def integer(name: str, x: Any) -> int:
    """`x` as an int: of Python's, NumPy's or JAX's integers."""
    try:
        if not isinstance(x, bool):
            return operator.index(x)
    except TypeError:
        pass
    raise InvalidArgumentError(f"{name} must be an integer, got {x!r}.")


def number(name: str, x: Any) -> float | int:
    """`x` as a Python number: of Python's, NumPy's or JAX's scalars."""
    if isinstance(x, (int, float)) and not isinstance(x, bool):
        return x
    try:
        if not isinstance(x, (bool, str, bytes)):
            return float(x)
    except (TypeError, ValueError):
        pass
    raise InvalidArgumentError(f"{name} must be a number, got {x!r}.")


def flag(name: str, x: Any) -> bool:
    """`x`, True or False."""
    if isinstance(x, bool):
        return x
    raise InvalidArgumentError(f"{name} must be True or False, got {x!r}.")


def instance(name: str, x: Any, kind: type, remedy: str) -> None:
    """Refuse an `x` of another kind."""
    if not isinstance(x, kind):
        got = "a class or function" if callable(x) else f"{type(x).__name__}"
        raise InvalidArgumentError(f"{name} must be a certjax.{kind.__name__}, got {got}; {remedy}.")

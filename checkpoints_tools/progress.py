"""A progress bar over tensors, or none."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")


def track(items: Iterable[T], total: int, title: str, enabled: bool) -> Iterator[T]:
    """Yield `items`, drawing a bar on the terminal while `enabled`; the bar goes away when the last is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not enabled, transient=True) as progress:
        yield from progress.track(items, total=total, description=title)

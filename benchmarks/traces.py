"""What JAX's profiler saw of a call."""

from __future__ import annotations

import collections
import gzip
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

WAITS = ("synchronize", "memcpydtoh", "memcpyd2h", "memcpyhtod", "memcpyh2d", "memcpyasync", "eventquery")
"""Parts of names of what the host does when it waits for the device or copies between the two."""

Event = dict[str, Any]


def events(f: Callable[..., Any], *arguments: Any) -> list[Event]:
    """Of `f(*arguments)` run to its end, in the form of Chrome's trace viewer; times in microseconds."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(f(*arguments))
        (path,) = Path(folder).glob("**/*.trace.json.gz")
        with gzip.open(path) as file:
            return json.load(file)["traceEvents"]


def on_device(found: list[Event]) -> Iterator[Event]:
    """What ran on a stream of a GPU."""
    names = {e["pid"]: e["args"]["name"] for e in found if e.get("name") == "process_name"}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in found if e.get("name") == "thread_name"}
    for e in found:
        place = e.get("pid"), e.get("tid")
        if e.get("ph") == "X" and "GPU" in names.get(place[0], "") and "Stream" in threads.get(place, ""):
            yield e


def by_kernel(found: list[Event], calls: int) -> dict[str, Any]:
    """Microseconds and launches a call, by kernel, where `calls` of them were recorded."""
    kernels = collections.defaultdict(lambda: [0, 0.0])
    first, last = float("inf"), 0.0
    for e in on_device(found):
        entry = kernels[e["name"]]
        entry[0] += 1
        entry[1] += e["dur"]
        first, last = min(first, e["ts"]), max(last, e["ts"] + e["dur"])
    ranked = sorted(kernels.items(), key=lambda x: -x[1][1])
    return {
        "span_us": round((last - first) / calls, 2),
        "busy_us": round(sum(us for _, (_, us) in ranked) / calls, 2),
        "kernels": sum(count for _, (count, _) in ranked) / calls,
        "by_kernel": {name: (count / calls, round(us / calls, 2)) for name, (count, us) in ranked},
    }


def host_waits(found: list[Event], calls: int) -> dict[str, float]:
    """How often a call makes the host wait or copy, by what it is called (`WAITS`)."""
    names = (e.get("name", "").lower() for e in found if e.get("ph") == "X")
    counted = collections.Counter(name for name in names if any(word in name for word in WAITS))
    return {name: round(n / calls, 3) for name, n in counted.most_common(12)}

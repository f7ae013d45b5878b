"""Match the tensors of a source with the leaves of the tree, before a byte of either is read.

The invariant that the writer relies on: every tensor is placed or knowingly ignored, and every layer of every leaf is
filled exactly once, by a tensor of the right shape.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from checkpoints_tools.errors import TensorMismatchError
from checkpoints_tools.names import Rule, Transform
from checkpoints_tools.sources.contract import Source, TensorInfo
from checkpoints_tools.tree import Shape, expected_leaves, is_stacked

_TIED = "tie_word_embeddings is true: the output projection is the embedding"


@dataclass(frozen=True)
class Placement:
    """Tensor `name` fills layer `layer` (None: the whole) of the leaf at `path`, through `transform`."""

    name: str
    path: str
    layer: int | None
    transform: Transform


@dataclass(frozen=True)
class Plan:
    """The outcome of matching: the leaves to write, the tensors that fill them, and those left out with the reason."""

    leaves: dict[str, Shape]
    placements: tuple[Placement, ...]
    ignored: dict[str, str]


def make_plan(source: Source) -> Plan:
    """Match `source.tensors` with the leaves that `source.config` implies.

    Raises
    ------
    TensorMismatchError
        Listing every missing, unexpected, twice-filled and wrong-shape tensor, not only the first.
    """
    leaves = expected_leaves(source.config)
    placements: list[Placement] = []
    ignored: dict[str, str] = {}
    unexpected: list[str] = []
    for name in source.tensors:
        rule, layer = _match(name, source.rules)
        if rule is not None and rule.ignored_because:
            ignored[name] = rule.ignored_because
        elif rule is not None and rule.path == "lm_head/kernel" and source.config["tie_word_embeddings"]:
            ignored[name] = _TIED
        elif rule is None or not _belongs(rule.path, layer, leaves):
            unexpected.append(name)
        else:
            placements.append(Placement(name, rule.path, layer, rule.transform))

    problems = _section("unexpected tensors", unexpected)
    problems += _section("missing tensors, by the leaf they would fill", _missing(leaves, placements))
    problems += _section("filled by more than one tensor", _repeated(placements))
    problems += _section("wrong shapes", _wrong_shapes(leaves, placements, source.tensors))
    if problems:
        raise TensorMismatchError(
            f"{source.path} does not hold the tensors that its configuration implies.\n"
            + "\n".join(problems)
            + "\nCheck that the configuration belongs to these weights, or download the checkpoint again."
        )
    return Plan(leaves, tuple(placements), ignored)


def _match(name: str, rules: tuple[Rule, ...]) -> tuple[Rule | None, int | None]:
    for rule in rules:
        if found := rule.pattern.fullmatch(name):
            layer = found.groupdict().get("layer")
            return rule, None if layer is None else int(layer)
    return None, None


def _belongs(path: str, layer: int | None, leaves: Mapping[str, Shape]) -> bool:
    return path in leaves and (layer is None or layer < leaves[path][0])


def _slots(path: str, shape: Shape) -> list[tuple[str, int | None]]:
    return [(path, layer) for layer in range(shape[0])] if is_stacked(path) else [(path, None)]


def _show(path: str, layer: int | None) -> str:
    return path if layer is None else f"{path} layer {layer}"


def _missing(leaves: Mapping[str, Shape], placements: list[Placement]) -> list[str]:
    filled = {(p.path, p.layer) for p in placements}
    return [_show(*slot) for path, shape in leaves.items() for slot in _slots(path, shape) if slot not in filled]


def _repeated(placements: list[Placement]) -> list[str]:
    names: dict[tuple[str, int | None], list[str]] = {}
    for p in placements:
        names.setdefault((p.path, p.layer), []).append(p.name)
    return [f"{_show(*slot)}: {', '.join(found)}" for slot, found in names.items() if len(found) > 1]


def _wrong_shapes(
    leaves: Mapping[str, Shape], placements: list[Placement], tensors: Mapping[str, TensorInfo]
) -> list[str]:
    wrong = []
    for p in placements:
        shape = leaves[p.path][1:] if is_stacked(p.path) else leaves[p.path]
        wanted, found = p.transform.stored_shape(shape), tensors[p.name].shape
        if found != wanted:
            wrong.append(f"{p.name}: stored {list(found)}, expected {list(wanted)}")
    return wrong


def _section(title: str, lines: list[Any]) -> list[str]:
    return [f"  {title} ({len(lines)}):", *(f"    {line}" for line in lines)] if lines else []

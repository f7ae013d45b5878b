"""Audit of a tier-1 format on a real model and text: what it loses, what can be certified, what fallback would cost.

Queries, keys and values are captured from the model. Every head of every layer, at some of the last positions, goes
through certified attention twice, as stored (the "observe" policy) and with fallback (the "budget" policy), and both
outputs are compared with float64 attention over the originals.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track

from certjax import host
from certjax.attention import certified_attention
from certjax.cache import TieredKVCache
from certjax.capture import CHUNK, Captured, capture
from certjax.errors import InvalidArgumentError
from certjax.model import Model
from certjax.policy import Policy

_KEPT = ("e_total", "tolerance", "rung", "k_star", "n_value_promoted", "bytes_read", "bytes_paged_in")


@dataclasses.dataclass(frozen=True, eq=False)
class AuditReport:
    """What an audit saw. P positions, L layers, Hq query heads; a head-step is one head at one position.

    Errors are fractions of the layer norm, the norm of the layer's concatenated exact head outputs over sqrt(Hq), which
    is what the tolerance is relative to.

    Attributes
    ----------
    model : name of the model
    policy : the budget policy, whose format and tolerance were audited
    n_tokens : N, tokens of the text that were read
    positions : the P positions whose queries were used, each of which attends to the tokens up to itself
    true, certified : `[P, L, Hq]` float64
        Error of the format as stored, and the certified bound on it.
    promoted : `[P, L, Hq]` int
        With fallback: blocks whose keys, and blocks whose values, were replaced by originals, added up.
    dense : `[P, L, Hq]` bool
        With fallback: heads computed from all their originals.
    bytes_stored, bytes_read, bytes_paged_in : `[P, L]` int64
        Bytes read on the device by the format as stored and with fallback, and from the host with fallback. A KV head
        counts once.
    bytes_dense : `[P, 1]` int64
        What dense attention reads in a layer: keys and values of the tokens that the position attends to.
    violations
        True errors above their bound, in both runs. Anything but 0 is a bug in certjax.
    broken
        Head-steps with fallback that are neither within their tolerance nor dense. Anything but 0 is a bug.
    checks_failed
        Head-steps as stored where a check failed, so that dense attention answered and the format was not measured.
    token_bytes, token_bytes_original
        Bytes a token and KV head in tier 1 (codes, metadata, annotations), and of the original key and value.
    """

    model: str
    policy: Policy
    n_tokens: int
    positions: tuple[int, ...]
    true: np.ndarray
    certified: np.ndarray
    promoted: np.ndarray
    dense: np.ndarray
    bytes_stored: np.ndarray
    bytes_read: np.ndarray
    bytes_paged_in: np.ndarray
    bytes_dense: np.ndarray
    violations: int
    broken: int
    checks_failed: int
    token_bytes: float
    token_bytes_original: int

    @property
    def heads(self) -> dict[str, np.ndarray]:
        """Per layer and head, `[L, Hq]` each: `true_median`, `true_max`, `certified_median`, `certified_max`."""
        both, ways = {"true": self.true, "certified": self.certified}, {"median": np.median, "max": np.max}
        return {f"{of}_{how}": reduce(x, 0) for of, x in both.items() for how, reduce in ways.items()}

    def worst_heads(self, by: str = "true") -> list[dict[str, Any]]:
        """Heads whose largest error ("true" or "certified") exceeds the tolerance, worst first."""
        largest = {of: self.heads[f"{of}_max"] for of in ("true", "certified")}
        at = [(int(i), int(j)) for i, j in np.argwhere(~(largest[by] <= self.policy.tolerance))]
        at.sort(key=lambda head: -largest[by][head])
        return [{"layer": i, "head": j, **{of: _plain(x[i, j]) for of, x in largest.items()}} for i, j in at]

    def summary(self, layer: int | None = None) -> dict[str, Any]:
        """Errors, counts and costs over all head-steps, or those of one layer. Plain types, None where not finite."""
        at = slice(None) if layer is None else slice(layer, layer + 1)
        of = {"head_steps": self.true[:, at].size}
        for name in ("true", "certified"):
            x = getattr(self, name)[:, at]
            of[f"{name}_median"], of[f"{name}_max"] = _plain(np.median(x)), _plain(x.max())
            of[f"{name}_above_tolerance"] = int((~(x <= self.policy.tolerance)).sum())
        of["promoted_blocks_mean"] = float(self.promoted[:, at].mean())
        of["dense_share"] = float(self.dense[:, at].mean())
        of["bytes_paged_in_per_step"] = float(self.bytes_paged_in[:, at].sum() / len(self.positions))
        dense_bytes = np.broadcast_to(self.bytes_dense, self.bytes_read.shape)[:, at].sum()
        for name in ("bytes_stored", "bytes_read", "bytes_paged_in"):
            of[f"{name}_over_dense"] = float(getattr(self, name)[:, at].sum() / dense_bytes)
        return of

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, ready for JSON; None for what is not finite."""
        return {
            "model": self.model,
            "policy": dataclasses.asdict(self.policy),
            "tokens": self.n_tokens,
            "positions": list(self.positions),
            "violations": self.violations,
            "contract_broken": self.broken,
            "checks_failed": self.checks_failed,
            "bytes_per_token": self.token_bytes,
            "bytes_per_token_over_originals": self.token_bytes / self.token_bytes_original,
            "total": self.summary(),
            "layers": [self.summary(layer) for layer in range(self.true.shape[1])],
            "heads": {name: [[_plain(x) for x in row] for row in array] for name, array in self.heads.items()},
            "heads_above_tolerance": {by: self.worst_heads(by) for by in ("true", "certified")},
        }


def audit(
    model: Model, tokens: Sequence[int], policy: Policy | None = None, *, n_queries: int = 8, progress: bool = False
) -> AuditReport:
    """Audit the format of `policy` on the activations of a text.

    Parameters
    ----------
    tokens : `[N]` ids, N a positive multiple of 256 up to the model's context
    policy
        `Policy.budget(...)` relative to the layer: its format is audited, its tolerance is what fallback has to reach.
        Default: `Policy.budget()`.
    n_queries
        Positions to query, spread over the last 256, the last one included.
    progress
        Draw a progress bar over the positions on stderr.

    Raises
    ------
    InvalidArgumentError
        If the policy has no tolerance relative to the layer, `n_queries` is not in [1, 256], N is not as said, or the
        format does not fit the model's head dim.
    """
    policy = Policy.budget() if policy is None else policy
    if policy.kind != "budget" or policy.relative_to != "layer":
        raise InvalidArgumentError(
            f"an audit needs a tolerance relative to the layer; got a policy of kind {policy.kind!r} relative to "
            f"{policy.relative_to!r}. Use Policy.budget(tolerance, codec=...)."
        )
    seen, positions = spread(model, tokens, n_queries)
    return audit_captured(seen, positions, policy, name=model.name, progress=progress)


def spread(model: Model, tokens: Sequence[int], n_queries: int) -> tuple[Captured, list[int]]:
    """Activations with the queries of `n_queries` positions spread over the last 256, and these positions.

    Raises
    ------
    InvalidArgumentError
        If `n_queries` is not in [1, 256], or as `capture`.
    """
    if not 1 <= n_queries <= CHUNK:
        raise InvalidArgumentError(f"n_queries must be in [1, {CHUNK}], got {n_queries}.")
    seen = capture(model, tokens, n_queries=CHUNK)
    picked = np.arange(1, n_queries + 1) * CHUNK // n_queries - 1
    return (
        Captured(q=seen.q[:, picked], keys=seen.keys, values=seen.values),
        [seen.keys.shape[-2] - CHUNK + int(i) for i in picked],
    )


def audit_captured(
    seen: Captured, positions: list[int], policy: Policy, *, name: str = "model", progress: bool = False
) -> AuditReport:
    """`audit` of activations that were captured before, with their queries at `positions`."""
    n, d = seen.keys.shape[-2:]
    policies = (dataclasses.replace(policy, kind="observe", tolerance=None), policy)
    steps = track(positions, "Auditing", console=Console(stderr=True), disable=not progress, transient=True)
    results = [
        jax.device_get(_certify(seen.q[:, i], seen.keys, seen.values, jnp.int32(p + 1), policies))
        for i, p in enumerate(steps)
    ]
    (stored_out, stored), (out, record) = jax.tree.map(lambda *x: np.stack(x), *results)  # [P, L, Hq, ...]

    truth = exact(seen, positions)
    errors = [np.linalg.norm(x.astype(np.float64) - truth, axis=-1) for x in (stored_out, out)]
    scale = np.maximum(np.sqrt((truth**2).sum(-1).mean(-1, keepdims=True)), np.finfo(np.float64).tiny)  # [P, L, 1]
    token = 2 * d * seen.keys.dtype.itemsize
    dense = record["rung"] >= 3

    def per_layer(x):
        return x.astype(np.int64).sum(-1)

    return AuditReport(
        model=name,
        policy=policy,
        n_tokens=n,
        positions=tuple(positions),
        true=errors[0] / scale,
        certified=stored["e_total"] / scale,
        promoted=record["k_star"] + record["n_value_promoted"],
        dense=dense,
        bytes_stored=per_layer(stored["bytes_read"]),
        bytes_read=per_layer(record["bytes_read"]),
        bytes_paged_in=per_layer(record["bytes_paged_in"]),
        bytes_dense=(np.array(positions)[:, None] + 1) * seen.keys.shape[2] * token,
        violations=sum(int((~(e <= r["e_total"])).sum()) for e, r in zip(errors, (stored, record), strict=True)),
        broken=int((~(record["e_total"] <= record["tolerance"]) & ~dense).sum()),
        checks_failed=int((stored["rung"] >= 3).sum()),
        token_bytes=_tier1_bytes_per_token(seen, policy),
        token_bytes_original=token,
    )


def exact(seen: Captured, positions: list[int]) -> np.ndarray:
    """`O*` of the captured queries at `positions` by NumPy, float64: `[P, L, Hq, d]`."""
    queries = np.asarray(seen.q, np.float64).swapaxes(0, 1)  # [P, L, Hq, d]
    out = np.empty(queries.shape)
    for layer in range(queries.shape[1]):
        k, v = (np.asarray(x[layer, 0]).astype(np.float64) for x in (seen.keys, seen.values))  # [Hkv, N, d]
        for i, position in enumerate(positions):
            q = queries[i, layer].reshape(k.shape[0], -1, k.shape[-1])
            s = q @ k[:, : position + 1].swapaxes(-1, -2) / np.sqrt(k.shape[-1])
            w = np.exp(s - s.max(-1, keepdims=True))
            out[i, layer] = ((w / w.sum(-1, keepdims=True)) @ v[:, : position + 1]).reshape(out.shape[2:])
    return out


@functools.partial(jax.jit, static_argnames="policies")
def _certify(q, keys, values, length, policies: tuple[Policy, ...]):
    """Output `[L, Hq, d]` and some of the certificate's leaves `[L, Hq]` under each of the policies, which share a
    format. `q`: `[L, Hq, d]`, `keys`, `values`: `[L, 1, Hkv, N, d]`. Layer by layer: one cache at a time is alive."""

    def one_layer(x):
        q, k, v = x
        cache = TieredKVCache.from_prefill(k, v, policies[0], lengths=length[None], capacity=k.shape[-2])
        results = []
        for policy in policies:
            out, record = certified_attention(q[None], cache, policy)
            results.append((out[0], {name: getattr(record, name)[0] for name in _KEPT}))
        return results

    return jax.lax.map(one_layer, (q, keys, values))


def _tier1_bytes_per_token(seen: Captured, policy: Policy) -> float:
    """Bytes of codes, metadata and annotations a token and KV head."""
    k, v = (jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in (seen.keys, seen.values))
    cache = jax.eval_shape(lambda k, v: TieredKVCache.from_prefill(k, v, policy, capacity=k.shape[-2]), k, v)
    tier1 = cache.nbytes()["tier1"] - host.nbytes(*jax.tree.leaves(cache.stats))
    return tier1 / (k.shape[1] * cache.capacity)


def _plain(x) -> float | None:
    return float(x) if np.isfinite(x) else None

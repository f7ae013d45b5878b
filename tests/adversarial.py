"""Inputs made to break a certificate. Shared by the property tests and the long soundness run."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from certjax import Policy
from certjax.fused.dispatch import kernels_of_device

SHAPE = dict(batch=16, n_kv_heads=2, group=4, capacity=160, head_dim=32)
"""One static shape, so that every draw reuses the compiled program: 128 head-steps a call."""

FUSED_SHAPE = dict(batch=4, n_kv_heads=2, group=4, capacity=896, head_dim=64)
WIDE_FUSED_SHAPE = dict(batch=2, n_kv_heads=1, group=6, capacity=896, head_dim=128)
"""For policies whose blocks are the 128 tokens of the fused kernels, which read bfloat16 only."""


def gaussian(rng, shape):
    return rng.standard_normal(shape)


def outlier_channels(rng, shape):
    x = rng.standard_normal(shape)
    x[..., rng.integers(shape[-1], size=2)] *= 10.0 ** rng.uniform(1, 3)
    return x


def constant_channels(rng, shape):
    x = rng.standard_normal(shape)
    x[..., rng.random(shape[-1]) < 0.5] = rng.standard_normal() * 10
    return x


def ties(rng, shape):
    """A handful of distinct vectors repeated: equal scores, equal masses, equal contributions."""
    few = rng.standard_normal((*shape[:-2], 3, shape[-1]))
    return np.take_along_axis(few, rng.integers(3, size=(*shape[:-1], 1)), axis=-2)


def all_equal(rng, shape):
    return np.broadcast_to(rng.standard_normal((*shape[:-2], 1, shape[-1])), shape).copy()


def common_offset(rng, shape):
    """A large mean with small variation: cancellation in every score."""
    return rng.standard_normal((*shape[:-2], 1, shape[-1])) * 30 + rng.standard_normal(shape) * 0.05


def heavy_tailed(rng, shape):
    return rng.standard_t(1.5, shape)


def one_spike(rng, shape):
    """One token far away: alone in a block whose other tokens it makes coarse."""
    x = rng.standard_normal(shape) * 0.1
    x[..., rng.integers(shape[-2]), :] *= 500
    return x


def half_extremes(rng, shape):
    """The largest, smallest and subnormal numbers of float16."""
    pool = np.array([65504.0, -65504.0, 6.1e-5, -6.1e-5, 6e-8, -6e-8, 0.0, 1.0, -1.0])
    return rng.choice(pool, shape)


def zeros(rng, shape):
    return np.zeros(shape)


def rounding_edges(rng, shape):
    """Values half way between two codes, where a quantizer's rounding is most wrong."""
    return (rng.integers(-16, 16, shape) + 0.5) * rng.choice([0.25, 1.0, 3.0])


FAMILIES = {
    f.__name__: f
    for f in (
        gaussian, outlier_channels, constant_channels, ties, all_equal, common_offset, heavy_tailed, one_spike,
        half_extremes, zeros, rounding_edges,
    )
}  # fmt: skip

QUERY_SCALES = (0.0, 1e-4, 0.3, 1.0, 4.0, 30.0, 1e3)
"""From flat attention to one-hot, and on to scores that float32 cannot hold apart."""

DATA_SCALES = (1e-6, 1e-2, 1.0, 30.0)

DTYPES = {"float16": jnp.float16, "bfloat16": jnp.bfloat16}

PLAIN = dict(codec="int8_int4", annotations="bfloat16", spectral=False, skip_values=False)
"""The paper's format under the budget policy, without what is our own."""

FUSED = dict(block_size=128, backend=kernels_of_device() if jax.devices()[0].platform == "gpu" else "reference")
"""The kernels where there is a GPU for them, their twins elsewhere."""

POLICIES = {
    "paper": Policy.paper(),
    "paper_fp16_metadata": Policy.paper(key_metadata="float16", centre="mean", ranking_depth=3, exploration=0.1),
    "paper_clamped": Policy.paper(k_min=1, k_max=2, rung1_multiplier=1.0, v_tol=1e9, ranking_depth=0),
    "paper_planes": Policy.paper(codec="planes", k_max=3, annotations="byte", spectral=True, key_planes=(4, 4)),
    "budget": Policy.budget(0.05, sink_tokens=16, recent_tokens=16, **PLAIN),
    "budget_loose": Policy.budget(100.0, sink_tokens=0, recent_tokens=0, **{**PLAIN, "centre": "zero"}),
    "budget_head": Policy.budget(
        0.2, "head", sink_tokens=16, recent_tokens=0, group_size=8, max_promoted=1.0, codec="int8_int4"
    ),
    "budget_absolute": Policy.budget(
        0.3, "absolute", sink_tokens=0, recent_tokens=32, codec="int8_int4", key_metadata="float16", scrub=4
    ),
    "planes": Policy.budget(0.02, sink_tokens=16, recent_tokens=16),
    "planes_loose": Policy.budget(100.0, key_planes=(8,), value_planes=(2,), sink_tokens=0, recent_tokens=0),
    "planes_fine": Policy.budget(
        0.1, key_planes=(4, 4, 4), value_planes=(2, 2, 2), sink_tokens=0, recent_tokens=0, centre="mean"
    ),
    "planes_whole": Policy.observe(key_planes=(8, 2), value_planes=(4,), refine=False, sink_tokens=0, recent_tokens=0),
    "fp8": Policy.budget(0.2, codec="fp8_e4m3", sink_tokens=0, recent_tokens=16, fp8_scale="head"),
    "fp8_tensor": Policy.observe(codec="fp8_e4m3", sink_tokens=0, recent_tokens=0),
    "kivi_int4": Policy.budget(0.3, codec="kivi_int4", sink_tokens=0, recent_tokens=16, max_promoted=1.0),
    "kivi_int2": Policy.observe(codec="kivi_int2", sink_tokens=0, recent_tokens=0),
    "fused": Policy.budget(0.05, **FUSED),
    "fused_loose": Policy.budget(100.0, recent_tokens=0, sink_tokens=0, **FUSED),
    "fused_head": Policy.budget(0.2, "head", recent_tokens=0, max_promoted=1.0, **FUSED),
    "fused_equal": Policy.budget(0.1, allotment="equal", centre="zero", recent_tokens=0, host_price=1.0, **FUSED),
    "fused_absolute": Policy.budget(0.3, "absolute", max_promoted=1.0, **FUSED),
    "fused_whole": Policy.observe(recent_tokens=0, sink_tokens=0, **FUSED),
    "paper_on_device": Policy.paper(tier2="device"),
    "planes_on_device": Policy.budget(0.02, sink_tokens=16, recent_tokens=16, tier2="device"),
    "int8_fp16": Policy.observe(codec="int8_fp16", sink_tokens=0, recent_tokens=16),
    "int8_int8": Policy.budget(0.05, codec="int8_int8", sink_tokens=0, recent_tokens=16, annotations="bfloat16"),
}


CORE = {
    "paper": ("float16", "bfloat16"),
    "paper_planes": ("bfloat16",),
    "budget": ("bfloat16",),
    "planes": ("float16",),
    "planes_whole": ("float16", "bfloat16"),
    "fp8": ("float16",),
    "kivi_int2": ("bfloat16",),
    "fused": ("bfloat16",),
    "fused_whole": ("bfloat16",),
}
"""What every run of the suite looks at, and in which dtypes; long runs look at every policy in every dtype (a policy
and dtype take ten seconds to compile)."""

SEARCHED = ("paper", "budget", "planes", "fused")
"""What hypothesis searches in every run of the suite; it searches all of them in long ones."""


def shape_of(policy: Policy) -> dict[str, int]:
    """The shape that a policy is drawn for."""
    if policy.block_size != 128:
        return SHAPE
    return WIDE_FUSED_SHAPE if policy.kind == "observe" or policy.relative_to == "head" else FUSED_SHAPE


@functools.cache
def lengths_pool(block: int, top: int) -> np.ndarray:
    """Lengths around every block edge that the capacity allows."""
    edges = [n + e for n in range(0, top + 1, block) for e in (-1, 0, 1)]
    return np.array(sorted({n for n in edges if 1 <= n <= top}))


def draw(rng, policy: Policy, key_family: str, value_family: str, query_scale: float, key_scale: float,
         value_scale: float, dtype: str):  # fmt: skip
    """`q` [b, Hq, d] float32, `keys`, `values` [b, Hkv, N, d] originals, `lengths` [b], in the policy's shape."""
    b, h, g, n, d = shape_of(policy).values()
    dtype = "bfloat16" if policy.block_size == 128 else dtype
    limit = 65504.0 if dtype == "float16" else 1e30
    keys = np.clip(FAMILIES[key_family](rng, (b, h, n, d)) * key_scale, -limit, limit)
    values = np.clip(FAMILIES[value_family](rng, (b, h, n, d)) * value_scale, -limit, limit)
    q = rng.standard_normal((b, h * g, d)) * query_scale
    # Some queries look straight at a key: the hardest ones for a ranking.
    target = keys[np.arange(b)[:, None], np.arange(h * g) // g, rng.integers(n, size=(b, h * g))]
    norm = np.maximum(np.linalg.norm(target, axis=-1, keepdims=True), 1e-12)
    aimed = rng.random((b, h * g, 1)) < 0.3
    q = np.where(aimed, target / norm * np.sqrt(d) * query_scale, q)
    lengths = rng.choice(lengths_pool(policy.block_size, n), b)
    return (
        jnp.asarray(q, jnp.float32),
        jnp.asarray(keys, DTYPES[dtype]),
        jnp.asarray(values, DTYPES[dtype]),
        jnp.asarray(lengths, jnp.int32),
    )

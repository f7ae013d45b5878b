"""The kernels of the fused path: twins against the codec and float64, and lowering of the Mosaic kernels for CUDA.

On a GPU `pytest -m gpu` compares the compiled kernels with their twins.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from certjax import Policy, TieredKVCache
from certjax.fused import operands as ops
from certjax.fused.attention import fused_attention
from pallas_kernels import dispatch
from pallas_kernels import query as qr
from tests.oracle import f64

B, H, G, N = 2, 2, 4, 1024
LENGTHS = jnp.array([1024, 777])
POLICY = Policy.budget(0.05, block_size=128)


@functools.cache
def problem(d: int):
    """A stacked cache of two layers, and queries `[b, Hkv, G, d]`."""
    a, b, c = jax.random.split(jax.random.key(d), 3)
    keys, values = (jax.random.normal(k, (2, B, H, N, d)).astype(jnp.bfloat16) for k in (a, b))
    build = jax.jit(lambda k, v: TieredKVCache.from_prefill(k, v, POLICY, lengths=LENGTHS, capacity=N))
    return build(keys, values), jax.random.normal(c, (B, H, G, d))


def operands(d: int):
    cache, q = problem(d)
    layer = ops.layer_of(cache, jnp.int32(1))
    return cache, layer, ops.prepare(q.reshape(B * H, G, d), layer), q


def calls(d: int):
    """Name, arguments and whether a tile's row counts, of each kernel."""
    _, x, q, _ = operands(d)
    chosen = (jax.random.uniform(jax.random.key(1), x.active.shape) < 0.6) & x.active
    flags = chosen.astype(jnp.int32)
    half = qr.split_channels(qr.bf16_pair(q.turned))
    return {
        "scan": (
            x.meta, q.turned.high, q.turned.low, q.scan, x.keys, x.key_scale, x.nu, x.live, q.pair, q.originals,
            x.windows,
        ),
        "attend": (
            x.meta, flags, q.turned.high, q.turned.low, half, q.attend, x.keys, x.keys_low, x.key_scale, x.values,
            x.values_low, x.value_scale, x.nu,
        ),
        "originals": (x.meta, flags, q.pair, q.originals, x.host_keys, x.host_values),
    }, x.active, chosen  # fmt: skip


def weights_in_float64(q, k, reference, d):
    """`e^(q.k/sqrt(d) - reference)`: `q` [H, C, d], `k` [H, N, d] -> [H, N, C]."""
    return np.exp(np.einsum("hnd,hcd->hnc", f64(k), f64(q)) / np.sqrt(d) - f64(reference)[:, None])


@pytest.mark.parametrize("d", [64, 128])
def test_fixed_point_queries_are_within_their_stated_error(d):
    _, _, q, plain = operands(d)
    for fixed, exact in ((q.plain, plain.reshape(B * H, G, d)),):
        gap = np.linalg.norm(f64(qr.value(fixed))[:, :G] - f64(exact), axis=-1)
        assert (gap <= f64(fixed.error)[:, :G]).all() and (gap > 0.2 * f64(fixed.error)[:, :G]).all()


@pytest.mark.parametrize("d", [64, 128])
def test_scan_sums_weights_of_coarse_keys(d):
    cache, x, q, plain = operands(d)
    stats, acc, sums = dispatch.reference_kernels().scan(*calls(d)[0]["scan"])
    codes = jax.tree.map(lambda a: a[1], cache.codes)
    rotated = np.asarray(cache.codec.to_basis(plain)).reshape(B * H, G, d)
    y = np.asarray(cache.codec.keys(codes, 0)).reshape(B * H, N, d)
    centre = f64(plain.reshape(B * H, G, d)) @ f64(x.key_centre)[..., None] / np.sqrt(d)  # q.c_k
    w = weights_in_float64(rotated, y, f64(q.reference)[:, :G] - centre[..., 0], d).reshape(B * H, -1, 128, G)
    nu = f64(x.nu[1]).reshape(B * H, -1, 128, 1)
    active = np.asarray(x.active)
    for i, want in enumerate((w.sum(2), (w * nu).sum(2), (w * w).sum(2))):
        np.testing.assert_allclose(np.asarray(stats)[:, :, i, :G][active], want[active], rtol=2e-2 if i == 2 else 1e-2)
    # Windows are exact: sink, and the ring's blocks with their own lengths.
    tiles = np.concatenate([np.asarray(w[1]) for w in x.windows[::2]], 1).reshape(B * H, -1, 128, d)
    for tile in range(tiles.shape[1]):
        live = np.arange(128) < np.asarray(x.live)[:, tile, None]
        w = weights_in_float64(plain.reshape(B * H, G, d), tiles[:, tile], f64(q.reference)[:, :G], d) * live[..., None]
        total = f64(sums)[:, tile, 0, :G] * np.exp2(np.maximum(f64(sums)[:, tile, 3, :G], -1e4))
        np.testing.assert_allclose(total, w.sum(1), rtol=1e-2, atol=1e-300)


@pytest.mark.parametrize("d", [64, 128])
def test_attend_sums_values_at_the_finest_level(d):
    cache, x, q, plain = operands(d)
    arguments, _, chosen = calls(d)
    acc, stats = dispatch.reference_kernels(3).attend(*arguments["attend"])
    codes = jax.tree.map(lambda a: a[1], cache.codes)
    rotated = np.asarray(cache.codec.to_basis(plain)).reshape(B * H, G, d)
    k = np.asarray(cache.codec.keys(codes, 1)).reshape(B * H, N, d)
    v = f64(cache.codec.values(codes, 1)).reshape(B * H, N, d)
    centre = f64(plain.reshape(B * H, G, d)) @ f64(x.key_centre)[..., None] / np.sqrt(d)
    w = weights_in_float64(rotated, k, f64(q.reference)[:, :G] - centre[..., 0], d)
    w = w * np.repeat(np.asarray(chosen), 128, axis=1)[..., None]
    want = np.einsum("hnc,hnd->hdc", w, v)
    assert acc.shape[1] == 3
    np.testing.assert_allclose(np.asarray(acc.sum(1))[..., :G], want, rtol=0, atol=1e-2 * np.abs(want).max())
    np.testing.assert_allclose(stats[:, :, 0, :G].sum(1), w.sum(1), rtol=1e-2)


@pytest.mark.parametrize("d", [64, 128])
def test_dense_pass_over_originals_is_attention(d):
    _, x, q, plain = operands(d)
    everything = jnp.ones(x.active.shape, jnp.int32)
    acc, sums = dispatch.reference_kernels(3).originals(
        x.meta, everything, q.pair, q.originals, x.host_keys, x.host_values
    )
    scale = np.exp2(f64(sums)[:, :, 3] - f64(sums)[:, :, 3].max(1, keepdims=True))
    out = (f64(acc) * scale[:, :, None]).sum(1) / (f64(sums)[:, :, 0] * scale).sum(1)[:, None]
    k, v = (f64(a[1]).reshape(B * H, N, d) for a in (x.host_keys, x.host_values))
    live = np.arange(N) < np.repeat(np.asarray(LENGTHS), H)[:, None]
    s = np.einsum("hnd,hcd->hnc", k, f64(plain.reshape(B * H, G, d))) / np.sqrt(d)
    w = np.exp(s - s.max(1, keepdims=True)) * live[..., None]
    want = np.einsum("hnc,hnd->hdc", w / w.sum(1, keepdims=True), v)
    np.testing.assert_allclose(out[..., :G], want, rtol=0, atol=1e-3)


@pytest.mark.parametrize("d", [64, 128])
def test_kernels_lower_for_cuda_without_a_gpu(d):
    """The whole fused step with every kernel in it."""
    cache, _ = problem(d)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), cache)
    q = jax.ShapeDtypeStruct((B, H, G, d), jnp.float32)

    @jax.jit
    def step(q, cache):
        sound = jnp.ones(B, bool)
        return fused_attention(q, cache, jnp.int32(1), POLICY, dispatch.mosaic_kernels(B * H), sound)

    lowered = step.trace(q, shapes).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("mosaic_gpu") >= 4  # scan, attend, promoted tiles, dense heads


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["scan", "attend", "originals"])
@pytest.mark.parametrize("d", [64, 128])
def test_kernel_equals_its_twin(d, name):
    arguments, active, chosen = calls(d)
    kernels, twins = dispatch.mosaic_kernels(B * H), dispatch.reference_kernels()
    got = jax.jit(functools.partial(getattr(kernels, name)))(*arguments[name])
    want = getattr(twins, name)(*arguments[name])
    if name == "scan":
        pairs = [(np.asarray(got[0])[active], np.asarray(want[0])[active]), *zip(got[1:], want[1:], strict=True)]
    elif name == "attend":
        pairs = [(got[0].sum(1), want[0].sum(1)), (np.asarray(got[1])[chosen], np.asarray(want[1])[chosen])]
    else:
        pairs = [tuple(ops_joined(*x) for x in (got, want))]
    for a, b in pairs:
        a, b = f64(a), f64(b)
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5 * np.abs(b[np.abs(b) < 1e29]).max())


def ops_joined(acc, sums):
    """`sum w v` in units of the largest weight."""
    scale = np.exp2(f64(sums)[:, :, 3] - f64(sums)[:, :, 3].max(1, keepdims=True))
    return (f64(acc) * scale[:, :, None]).sum(1)

"""The kernels of the fused path: twins against the codec and float64, those on Mosaic against their twins, and lowering
of them for CUDA. (Those in Triton: `test_triton_kernels.py`.)

On a GPU `pytest -m gpu` compares the compiled kernels with their twins.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from certjax import Policy, TieredKVCache, decode, programs
from certjax.fused import operands as ops
from certjax.fused.attention import additions_of, per_program_of
from certjax.models.llama.config import LlamaConfig
from certjax.models.llama.modeling import init_params
from certjax.sampling import Sampling
from pallas_kernels import dispatch
from pallas_kernels import levels as lv
from pallas_kernels import query as qr
from pallas_kernels.scan import dealing
from pallas_kernels.scan.dealing import MOST_AHEAD, deal
from tests.interpreter import of_mosaic
from tests.oracle import f64

pytestmark = pytest.mark.usefixtures("quick_compilation")
B, H, N = 2, 2, 1536
LENGTHS = jnp.array([1536, 1157])
GROUPS = {64: 4, 128: 6}
"""Head dim -> query heads of a group: four fill their columns, six do not."""
EVERY = pytest.mark.parametrize("d", GROUPS)
POLICY = Policy.budget(0.05, block_size=128)


@functools.cache
def problem(d: int):
    """A stacked cache of two layers, and queries `[b, Hkv, G, d]`."""
    a, b, c = jax.random.split(jax.random.key(d), 3)
    keys, values = (jax.random.normal(k, (2, B, H, N, d)).astype(jnp.bfloat16) for k in (a, b))
    build = jax.jit(lambda k, v: TieredKVCache.from_prefill(k, v, POLICY, lengths=LENGTHS, capacity=N))
    return build(keys, values), jax.random.normal(c, (B, H, GROUPS[d], d))


def operands(d: int):
    cache, q = problem(d)
    layer = ops.layer_of(cache, jnp.int32(1), ops.shared(cache))
    return cache, layer, ops.prepare(q.reshape(B * H, -1, d), layer), q


@functools.cache
def calls(d: int):
    """Arguments of each kernel; the tiles it scans, and how much of them is attended to."""
    _, x, q, _ = operands(d)
    chosen = (jax.random.uniform(jax.random.key(1), x.active.shape) < 0.6) & x.active
    flags = chosen.astype(jnp.int32)
    levels = flags * jax.random.randint(jax.random.key(2), flags.shape, 1, lv.PROMOTED + 1)
    some = jnp.array([1, 8, 6, lv.every_piece(d) - 2, lv.every_piece(d)])
    pieces = jax.random.choice(jax.random.key(3), some, flags.shape)
    words = lv.word(levels, jnp.where(levels == lv.PROMOTED, pieces, 0)).astype(jnp.int32)
    counts = lv.counts_of(words, x.active, jnp.zeros(len(words), bool))
    summary = lv.summary_of(words, d)
    scan = (
        x.index, x.meta, words, q.kernel, x.keys, x.key_scale, x.values, x.values_low, x.value_scale, x.nu, x.live,
        x.windows,
    )  # fmt: skip
    weights = dispatch.reference_kernels().scan(*scan)[1]
    fine = (
        x.index, words, counts, summary, q.kernel, x.keys, x.keys_low, x.key_scale, x.values, x.values_low,
        x.value_scale, x.nu, x.host_keys, x.host_values,
    )  # fmt: skip
    return {
        "scan": scan,
        "coarse": (x.index, words, counts, weights, x.values, x.values_low),
        "fine": fine,
        "fine_again": fine,
        "by_plan": (
            x.index, x.meta, words, counts, summary, q.kernel,
            (x.keys, x.keys_low, x.key_scale, x.values, x.values_low, x.value_scale, x.nu), x.live, x.windows,
            (x.host_keys, x.host_values),
        ),
        "originals": (x.index, x.meta, jnp.arange(len(words)) % 3, q.kernel, x.host_keys, x.host_values),
    }, np.asarray(x.active), np.asarray(words)  # fmt: skip


def weights_in_float64(q, k, reference, d):
    """`e^(q.k/sqrt(d) - reference)`: `q` [H, C, d], `k` [H, N, d] -> [H, N, C]."""
    return np.exp(np.einsum("hnd,hcd->hnc", f64(k), f64(q)) / np.sqrt(d) - f64(reference)[:, None])


@EVERY
def test_fixed_point_queries_are_within_their_stated_error(d):
    _, _, q, plain = operands(d)
    plain = f64(plain.reshape(B * H, -1, d))
    # All channels a little below a power of two, where an inexact scale shows.
    beside = np.broadcast_to(np.exp2(np.arange(-60.0, 60))[:, None, None] * (1 - 2.0**-18 * 0.37), (120, 1, d))
    for exact in (plain, plain * 1e-20, plain * 1e20, np.exp2(np.round(plain)), beside, 0 * plain):
        x = jnp.asarray(exact, jnp.float32)
        fixed = jax.jit(qr.fixed_point)(x, jnp.abs(x).max(-1))
        gap = np.linalg.norm(f64(qr.value(fixed)) - f64(x), axis=-1)
        assert (gap <= f64(fixed.error)).all()
        mantissa, _ = np.frexp(np.asarray(fixed.scale))
        assert (mantissa == 0.5).all()
    fixed = qr.fixed_point(jnp.asarray(plain, jnp.float32), jnp.abs(plain).max(-1))
    assert (np.linalg.norm(f64(qr.value(fixed)) - plain, axis=-1) > 0.2 * f64(fixed.error)).all()
    for x in (q.kernel.parts, q.kernel.wide, q.kernel.numbers):
        first, second = jnp.split(x, 2, axis=2)
        assert (first == second).all()


def test_weights_in_two_halves_add_up():
    w = jnp.exp2(jax.random.uniform(jax.random.key(0), (4096,), minval=-100, maxval=60))
    halves = jax.jit(qr.in_two_halves)(w[:, None])
    assert (np.abs(f64(halves).sum(-1) - f64(w)) <= 2.0**-17 * f64(w)).all()


def expected_weights(d: int, level: int, q, x, cache, plain):
    """Weights of keys at a level by the codec, in float64: [H, N, G]."""
    codes = jax.tree.map(lambda a: a[1], cache.codes)
    rotated = np.asarray(cache.codec.to_basis(plain)).reshape(B * H, -1, d)
    y = np.asarray(cache.codec.keys(codes, level)).reshape(B * H, N, d)
    centre = f64(plain.reshape(B * H, -1, d)) @ f64(x.key_centre)[..., None] / np.sqrt(d)  # q.c_k
    return weights_in_float64(rotated, y, f64(q.reference)[:, : GROUPS[d]] - centre[..., 0], d)


@EVERY
def test_scan_sums_weights_of_coarse_keys(d):
    cache, x, q, plain = operands(d)
    stats, halves, _, acc, sums = dispatch.reference_kernels().scan(*calls(d)[0]["scan"])
    group = GROUPS[d]
    w = expected_weights(d, 0, q, x, cache, plain).reshape(B * H, -1, 128, group)
    nu, scale = (f64(a[1]).reshape(B * H, -1, 128, 1) for a in (x.nu, x.value_scale))
    active = np.asarray(x.active)
    for i, want in enumerate((w, w * nu, w * w, w * scale)):
        np.testing.assert_allclose(np.asarray(stats)[:, :, i, :group][active], want.sum(2)[active], rtol=1e-3)
    weighted = f64(qr.folded(halves.astype(jnp.float32).swapaxes(2, 3)))[..., :group]
    np.testing.assert_allclose(weighted[active], (w * scale)[active], rtol=1e-3)
    # Windows are exact: sink, and the ring's blocks with their own lengths.
    tiles = np.concatenate([np.asarray(w[1]) for w in x.windows[::2]], 1).reshape(B * H, -1, 128, d)
    for tile in range(tiles.shape[1]):
        live = (np.arange(128) < np.asarray(x.live)[:, tile, None])[..., None]
        w = live * weights_in_float64(plain.reshape(B * H, -1, d), tiles[:, tile], f64(q.reference)[:, :group], d)
        total = f64(sums)[:, tile, 0, :group] * np.exp2(np.maximum(f64(sums)[:, tile, 3, :group], -1e4))
        np.testing.assert_allclose(total, w.sum(1), rtol=1e-3, atol=1e-300)


@EVERY
def test_second_pass_sums_values_at_their_level(d):
    cache, x, q, plain = operands(d)
    arguments, _, words = calls(d)
    kernels = dispatch.reference_kernels(3)
    coarse = kernels.coarse(*arguments["coarse"])
    fine, stats, host, host_sums = kernels.fine(*arguments["fine"])
    assert coarse.shape[1] == fine.shape[1] == 3 and set(range(5)) <= set(lv.level_of(words).ravel())
    codes = jax.tree.map(lambda a: a[1], cache.codes)
    level, group = np.repeat(lv.level_of(words), 128, axis=1)[..., None], GROUPS[d]
    original = np.repeat(np.asarray(lv.promoted_pieces(words, d)), lv.tokens_of_a_piece(d), axis=2).reshape(B * H, N, 1)
    assert 0 < original.sum() < (level == lv.PROMOTED).sum()
    scales = f64(x.value_scale[1])[..., None]
    finely = (1, 1, 2.5, (level >= lv.FINEST) & ~original)
    by_scan = (0, 0, 2.0, level == lv.COARSE), (0, 1, 2.5, level == lv.VALUES)  # planes of keys and values, offset
    for got, parts in ((coarse, by_scan), (fine, (finely,))):
        want = offset = 0.0
        for keys, values, less, read in parts:
            w = expected_weights(d, keys, q, x, cache, plain) * read
            want += np.einsum("hnc,hnd->hdc", w, f64(cache.codec.values(codes, values)).reshape(B * H, N, d))
            offset += less * (w * scales).sum(1)[:, None]
        np.testing.assert_allclose(f64(got.sum(1))[..., :group] + offset, want, rtol=0, atol=1e-3 * np.abs(want).max())
    w = w.reshape(B * H, -1, 128, group).sum(2)
    np.testing.assert_allclose(stats[:, :, 0, :group], w, rtol=2e-5, atol=1e-6 * w.max())
    k, v = (f64(a[1]).reshape(B * H, N, d) for a in (x.host_keys, x.host_values))
    w = weights_in_float64(plain.reshape(B * H, -1, d), k, f64(q.reference)[:, :group], d) * original
    scale = np.exp2(np.maximum(f64(host_sums)[:, :, 3, :group], -1e4))
    want = np.einsum("hnc,hnd->hdc", w, v)
    got = (f64(host)[..., :group] * scale[:, :, None]).sum(1)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-3 * np.abs(want).max())
    np.testing.assert_allclose((f64(host_sums)[:, :, 0, :group] * scale).sum(1), w.sum(1), rtol=1e-3)


@EVERY
def test_dense_pass_over_originals_is_attention(d):
    _, x, q, plain = operands(d)
    everybody = jnp.ones(len(x.active), jnp.int32)
    acc, sums = dispatch.reference_kernels(3).originals(
        x.index, x.meta, everybody, q.kernel, x.host_keys, x.host_values
    )
    scale = np.exp2(f64(sums)[:, :, 3] - f64(sums)[:, :, 3].max(1, keepdims=True))
    out = (f64(acc) * scale[:, :, None]).sum(1) / (f64(sums)[:, :, 0] * scale).sum(1)[:, None]
    k, v = (f64(a[1]).reshape(B * H, N, d) for a in (x.host_keys, x.host_values))
    live = np.arange(N) < np.repeat(np.asarray(LENGTHS), H)[:, None]
    s = np.einsum("hnd,hcd->hnc", k, f64(plain.reshape(B * H, -1, d))) / np.sqrt(d)
    w = np.exp(s - s.max(1, keepdims=True)) * live[..., None]
    want = np.einsum("hnc,hnd->hdc", w / w.sum(1, keepdims=True), v)
    np.testing.assert_allclose(out[..., : GROUPS[d]], want, rtol=0, atol=1e-3)


@pytest.mark.parametrize("width", [2, 4])
def test_fields_of_every_byte_are_exact(width):
    from pallas_kernels.mosaic import fields

    byte = np.arange(-128, 128)
    for i, found in enumerate(fields(jnp.asarray(byte, jnp.int8), width)):
        assert found.dtype == jnp.bfloat16
        code = byte >> (width * i) & (2**width - 1)
        code = np.where(code < 2 ** (width - 1), code, code - 2**width)  # two's complement
        np.testing.assert_array_equal(f64(found), code * 2.0 ** (8 - width))


KERNELS = pytest.mark.parametrize("name", ["scan", "coarse", "fine", "fine_again", "by_plan", "originals"])
ON_MOSAIC = pytest.mark.parametrize("name", ["scan", "fine", "by_plan"])
"""Kernels of the back end of that name that are not in Triton (those: `test_triton_kernels.py`)."""


def mosaic(heads: int) -> dispatch.Kernels:
    pytest.importorskip("triton", reason="a part of the kernels is in Triton")
    return dispatch.mosaic_kernels(heads)


@ON_MOSAIC
@EVERY
def test_kernels_lower_for_cuda_without_a_gpu(d, name):
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), calls(d)[0][name])
    lowered = jax.jit(getattr(mosaic(B * H), name)).trace(*shapes).lower(lowering_platforms=("cuda",))
    assert len(re.findall(r"custom_call @(\w*mosaic_gpu\w*)", lowered.as_text())) == 1


def test_the_benchmark_finds_the_lines_that_it_stamps():
    """A copy of the first pass's kernel with them lowers, too."""
    from benchmarks import stamps

    _, x, q, _ = operands(128)
    scan = stamps.stamped()
    tier1 = x.keys, x.key_scale, x.values, x.values_low, x.value_scale, x.nu
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype),
        ((x.index, x.meta, x.words, q.kernel, *tier1, x.live, x.windows),
         (x.counts, x.summary, x.keys_low, x.host_keys, x.host_values)),
    )  # fmt: skip
    run = jax.jit(lambda a, fine: scan.scan_and_fine(*a, fine=fine, splits=4, refiners=2, readers=2)[1][-1])
    result = run.trace(*shapes).lower(lowering_platforms=("cuda",)).out_info
    assert result.shape == (B * H, 4 + x.live.shape[1], stamps.N)


def interpreted():
    """With a search for races."""
    found = of_mosaic(detect_races=True)
    return pytest.skip("this JAX has no interpreter of Mosaic's kernels") if found is None else found


SLOTS = 256
"""KV heads for which a head has one program: it reads nine tiles, more than there are slots for."""


@ON_MOSAIC
@EVERY
def test_interpreted_kernel_equals_its_twin(d, name):
    check_interpreted(d, name, mosaic(SLOTS))


def check_interpreted(d: int, name: str, kernels: dispatch.Kernels):
    if name == "by_plan":
        one = functools.partial(kernels.scan_and_fine, interpret=interpreted())
        kernel = dataclasses.replace(kernels, scan_and_fine=one).by_plan
    else:
        kernel = functools.partial(getattr(kernels, name), interpret=interpreted())
    check_against_twin(d, name, kernel)
    races = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call")
    assert not races.get_races().races_found


@pytest.mark.parametrize("splits, refiners, readers, ahead", [(5, 2, 1, 0), (4, 4, 4, 7), (7, 2, 3, 7), (2, 1, 5, 7)])
def test_interpreted_scan_with_programs_that_have_something_else_to_do(splits, refiners, readers, ahead, monkeypatch):
    """Some of them, as either, or all of them; with tiles left for them, and without; fewer programs than readers."""
    monkeypatch.setattr(dealing, "AHEAD", ahead)
    monkeypatch.setattr(dealing, "MOST_AHEAD", ahead + 1)
    kernels = mosaic(SLOTS)
    one = functools.partial(kernels.scan_and_fine.func, splits=splits, refiners=refiners, readers=readers)
    check_interpreted(128, "by_plan", dataclasses.replace(kernels, scan_and_fine=one))


@pytest.mark.parametrize("heads", [1, 7, 8, 16, 33, 64, 256])
@pytest.mark.parametrize("back_end", ["mosaic_gpu", "triton", "triton on a small GPU"])
def test_roundings_of_uneven_shares_are_counted(back_end, heads):
    """Two a tile of a program's, and one a part that is added to others; and as many halves of tiles as one reads."""
    pytest.importorskip("triton")
    if back_end == "mosaic_gpu":
        kernels, uneven = dispatch.mosaic_kernels(heads), MOST_AHEAD
    else:
        kernels, uneven = dispatch.triton_kernels(heads, *((24, 100) if "small" in back_end else ())), 0
    scan, coarse, fine, dense = (
        getattr(kernels, name).keywords["splits"] for name in ("scan", "coarse", "fine_again", "originals")
    )
    for n_tiles in range(1, 2049):
        counted = additions_of(n_tiles, kernels)
        assert counted >= 2 * (-(-n_tiles // scan) + uneven) + kernels.splits
        assert counted >= 2 * -(-n_tiles // coarse) + kernels.splits
        for refining in range(1, min(fine, n_tiles) + 1):  # whose tiles may all be one program's
            assert counted >= 2 * min(refining, -(-n_tiles // refining)) + kernels.splits
        assert per_program_of(n_tiles, kernels.fewest_dense) >= -(-2 * n_tiles // dense)


def test_every_tile_is_dealt_to_one_program():
    programs, rng = 9, np.random.default_rng(0)
    busy = [(0, 0, 0), (1, 0, 7), (0, 2, 0), (2, 1, 2), (4, 4, 11), (5, 4, 90), (9, 9, 40), (9, 0, 9)]
    cases = [(n, *some) for n in [0, 1, 7, 8, 40, 71, 72, 300, *rng.integers(0, 300, 8)] for some in busy]

    def visited(program, n, refining, reading, listed):
        count, tile_at = deal(program, programs, n, refining, reading, listed)
        i = jnp.arange(320)
        return jnp.where(i < count, tile_at(i), -1)

    over_programs = jax.vmap(visited, (0, None, None, None, None))
    found = jax.jit(jax.vmap(over_programs, (None, 0, 0, 0, 0)))(jnp.arange(programs), *jnp.array(cases).T)
    for (n, refining, reading, _), tiles in zip(cases, np.asarray(found), strict=True):
        assert sorted(tiles[tiles >= 0]) == list(range(n))
        count = (tiles >= 0).sum(1)
        assert count.max() <= -(-n // programs) + MOST_AHEAD
        free = np.arange(refining, programs - reading)
        others = np.setdiff1d(np.arange(programs), free)
        if len(free) and len(others):
            assert count[free].min() >= count[others].max() and count[free].max() - count[free].min() <= 1


@pytest.mark.parametrize("n_tiles", [134, 270])
def test_interpreted_fine_finds_its_tiles_in_every_chunk(n_tiles):
    check_every_chunk(n_tiles, functools.partial(mosaic(SLOTS // 4).fine, interpret=interpreted()))


def check_every_chunk(n_tiles: int, kernel):
    """Tiles at the ends of chunks of 128, and behind an empty one; words in one row, and in two, the second of which
    goes beyond the summary."""
    d = 64
    k, v, q = (jax.random.normal(jax.random.key(i), (1, 1, 1, n, d)) for i, n in enumerate((n_tiles * 128,) * 2 + (2,)))
    build = jax.jit(lambda k, v: TieredKVCache.from_prefill(k, v, POLICY, capacity=n_tiles * 128))
    cache = build(k.astype(jnp.bfloat16), v.astype(jnp.bfloat16))
    x = ops.layer_of(cache, jnp.int32(0), ops.shared(cache))
    q = ops.prepare(q[0, 0], x).kernel
    whole, finest = lv.word(lv.PROMOTED, lv.every_piece(d)), lv.FINEST
    last = n_tiles - 4
    for chosen in (
        {1: finest, 127: whole, 128: finest, n_tiles - 3: lv.word(lv.PROMOTED, 2)}, {last: lv.word(lv.PROMOTED, 5)},
    ):  # fmt: skip
        words = jnp.zeros((1, n_tiles), jnp.int32).at[0, jnp.array(list(chosen))].set(jnp.array(list(chosen.values())))
        arguments = (
            x.index, words, lv.counts_of(words, x.active, jnp.zeros(1, bool)), lv.summary_of(words, d), q, x.keys,
            x.keys_low, x.key_scale, x.values, x.values_low, x.value_scale, x.nu, x.host_keys, x.host_values,
        )  # fmt: skip
        acc, stats, *host = jax.jit(kernel)(*jax.tree.map(np.asarray, arguments))
        want, want_stats, *want_host = dispatch.reference_kernels().fine(*arguments)
        left = np.asarray(lv.level_of_rest(words, d)) == lv.FINEST
        acc, host = working(words, acc, host)
        for a, b in (
            (qr.folded(acc.sum(1)), qr.folded(want.sum(1))), (stats[left], want_stats[left]),
            (ops_joined(*host), ops_joined(*want_host)),
        ):  # fmt: skip
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5 * np.abs(b).max())


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [B * H, SLOTS])
@ON_MOSAIC
@EVERY
def test_kernel_equals_its_twin(d, name, heads):
    kernel = jax.jit(getattr(mosaic(heads), name))
    first = check_against_twin(d, name, kernel)
    for _ in range(20):  # a race between warps need not show at once
        jax.tree.map(np.testing.assert_array_equal, found_by(d, name, kernel), first)


def check_against_twin(d, name, kernel):
    """Returns what the kernel did, less what may be anything."""
    got, want = found_by(d, name, jax.jit(kernel)), found_by(d, name, getattr(dispatch.reference_kernels(), name))
    for a, b in zip(got, want, strict=True):
        a, b = f64(a), f64(b)
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5 * np.abs(b[np.abs(b) < 1e29]).max())
    return got


def found_by(d, name, kernel):
    """What it returns, less what may be anything."""
    arguments, active, words = calls(d)
    # The interpreter takes nothing from host memory.
    here = arguments[name] if jax.default_backend() == "gpu" else jax.tree.map(np.asarray, arguments[name])

    def meaningful(result, name=name):
        if name == "by_plan":
            return [*meaningful(result[0], "scan"), *meaningful(result[1], "fine")]
        if name == "scan":
            stats, halves, coarse, *windows = result
            halves = np.asarray(halves, np.float32).swapaxes(2, 3)
            stats = np.asarray(stats)
            acc, sums = windows
            coarse = qr.folded(coarse.sum(1))
            found = stats[active], qr.folded(halves)[active], coarse, qr.folded(acc), sums
            return [np.asarray(x) for x in found]
        if name == "coarse":
            some = lv.by_scan(lv.level_of(words)).any(1)
            return [np.asarray(qr.folded(result.sum(1)))[some]]
        if name in ("fine", "fine_again"):
            acc, stats, *host = result
            level = np.asarray(lv.level_of_rest(words, d))
            acc, host = working(words, acc, host)
            return [np.asarray(qr.folded(acc.sum(1))), np.asarray(stats)[level == lv.FINEST], ops_joined(*host)]
        chosen = np.asarray(arguments["originals"][2]) > 0
        return [ops_joined(*(np.asarray(x)[chosen] for x in result))]

    return meaningful(kernel(*here))


def working(words, acc, host):
    """What programs of `fine` found that are at work, of what may be anything."""
    n_promoted, n_refined = ((lv.level_of(np.asarray(words)) >= level).sum(1) for level in (lv.PROMOTED, lv.FINEST))

    def kept(x, n):
        here = np.arange(x.shape[1]) < np.minimum(n, x.shape[1])[:, None]
        return np.where(here[..., None, None], x, 0.0)

    return kept(acc, n_refined), [kept(x, n_promoted) for x in host]


def ops_joined(acc, sums):
    """`sum w v` in units of the largest weight. A part that read nothing says so by a total of 0."""
    acc = np.where((f64(sums)[:, :, 0] != 0)[:, :, None], f64(acc), 0.0)
    scale = np.exp2(f64(sums)[:, :, 3] - f64(sums)[:, :, 3].max(1, keepdims=True))
    return qr.folded((f64(acc) * scale[:, :, None]).sum(1))


@pytest.mark.gpu
def test_kernels_that_run_at_once_change_no_bit():
    """Steps of a small model, a block completed on the way: with loops and conditionals left to the device, and kernels
    run at once that do not need each other, against the same programs one kernel after the other."""
    config = LlamaConfig(
        vocab_size=256, d_model=512, n_layers=3, n_heads=8, n_kv_heads=2, head_dim=128, d_ff=512, rms_eps=1e-5,
        context_length=4096, dtype="bfloat16",
    )  # fmt: skip
    params = init_params(config, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 1536), 0, 256)
    fixed = config, "certified", POLICY, Sampling()
    names = ("config", "mode", "policy", "sampling")

    def decoded(graphs: bool):
        options = {k: v for k, v in programs.accepted().items() if graphs or "command_buffer" not in k}
        run = jax.jit(decode.run.__wrapped__, static_argnames=names, compiler_options=options)
        start = decode.start(*fixed, 2048, 201, params, tokens, jnp.array([1500, 1337]), jax.random.key(2))
        return jax.device_get(run(*fixed, params, start, jnp.int32(200)).replace(key=None))

    a, b = decoded(True), decoded(False)
    assert "xla_gpu_command_buffer_scheduling_mode" in programs.accepted() and (a.tokens != 0).any()
    jax.tree.map(np.testing.assert_array_equal, a, b)

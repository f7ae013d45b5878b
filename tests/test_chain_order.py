"""What the chain must not depend on: the order in which programs run, and what is in memory that nothing was stored to.

And what it must: the token of the step, of which the originals are written on the way."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from certjax import Policy, TieredKVCache, decode
from certjax.fused.chain import chained_attention
from certjax.fused.dispatch import kernels_of, kernels_of_device
from certjax.fused.ladder import allotted
from certjax.models.llama.modeling import init_params
from pallas_kernels import dispatch
from pallas_kernels import levels as lv
from pallas_kernels.launch import launch
from pallas_kernels.originals.reference import LOWEST
from tests.oracle import f64
from tests.test_chain import ON_GPU, B, H, exact, problem
from tests.test_fused import small_model

pytest.importorskip("triton", reason="Triton's interpreter, or Triton for the GPU, is not installed")
POLICIES = {
    "kept": dict(tolerance=0.6),
    "promoting": dict(tolerance=0.25, host_price=0.01, max_promoted=1.0),
    "dense": dict(tolerance=0.002),
}
EVERY = pytest.mark.parametrize("name", POLICIES)


def kernels():
    return kernels_of(kernels_of_device(), B * H) if ON_GPU else dispatch.reference_kernels()


def as_the_kernels_leave_it(plain: dispatch.Kernels) -> dispatch.Kernels:
    """The twins, with NaN wherever kernels may leave anything, and all that programs find with the last at work."""

    def where(some, x, other=jnp.nan):  # `some`: leading axes of `x`
        return jnp.where(some.reshape(*some.shape, *[1] * (x.ndim - some.ndim)), x, jnp.asarray(other, x.dtype))

    def scan(layer, meta, words, *rest):
        stats, weights, coarse, *windows = plain.scan(layer, meta, words, *rest)
        tile = jnp.arange(stats.shape[1])
        read = (tile >= meta[:, :1]) & (tile < meta[:, 1:2])
        return where(read, stats), where(read, weights), coarse, *windows

    def coarse(layer, words, counts, *rest):
        return where(counts[:, lv.N_COARSE] + counts[:, lv.N_VALUES] > 0, plain.coarse(layer, words, counts, *rest))

    def fine(layer, words, counts, summary, q, keys, *rest):
        acc, stats, found, sums = plain.fine_again(layer, words, counts, summary, q, keys, *rest)
        n_promoted, program = counts[:, lv.N_PROMOTED], jnp.arange(acc.shape[1])
        refining, reading = (
            lv.at_work(n, acc.shape[1])[:, None] for n in (counts[:, lv.N_FINEST] + n_promoted, n_promoted)
        )
        acc = where(program < refining, where(program == refining - 1, acc.sum(1, keepdims=True) + 0 * acc, 0.0))
        nothing = jnp.array([0.0, 0.0, 0.0, LOWEST])[:, None]
        sums = where(program < reading, jnp.where((program == reading - 1)[..., None, None], sums[:, :1], nothing))
        found = where((program == reading - 1) & (sums[:, :, 0, 0] != 0), found[:, :1] + 0 * found)
        finest = lv.level_of_rest(words[:, : stats.shape[1]], keys.shape[3]) == lv.FINEST
        return acc, where(finest & (refining > 0), stats), found, sums

    def originals(layer, meta, chosen, *rest, **options):
        return [where(chosen > 0, x) for x in plain.originals(layer, meta, chosen, *rest, **options)]

    return dataclasses.replace(plain, scan=scan, coarse=coarse, fine_again=fine, originals=originals)


@pytest.fixture
def shuffled(monkeypatch):
    """Makes the interpreter run the programs of a grid in an order of its own."""
    from triton.runtime.interpreter import interpreter_builder as builder

    order, set_dim, set_index = {}, builder.set_grid_dim, builder.set_grid_idx

    def shuffle(*grid):
        places = list(np.ndindex(*grid))
        order.update(zip(places, np.random.default_rng(len(order)).permutation(places).tolist(), strict=True))
        set_dim(*grid)

    def start():
        monkeypatch.setattr(builder, "set_grid_dim", shuffle)
        monkeypatch.setattr(builder, "set_grid_idx", lambda *index: set_index(*order[index]))

    return start


def run(f, *arguments):
    return jax.tree.map(np.asarray, jax.block_until_ready(jax.jit(f)(*arguments)))


@pytest.mark.skipif(ON_GPU, reason="the order of programs is the device's")
@EVERY
def test_order_and_what_was_in_memory_change_no_bit(name, shuffled, monkeypatch):
    from pallas_kernels.judge import tally

    monkeypatch.setattr(tally, "FEWEST_TILES", 4)  # three programs of a head, the last of which is half empty
    monkeypatch.setattr(tally, "ENOUGH_PARTS", 3)
    assert tally.tiles_and_parts(12) == (4, 3)
    cache, q = problem(64)
    policy, sound = Policy.budget(block_size=128, **POLICIES[name]), jnp.array([True, name != "kept"])

    def attend(q, cache, kernels):
        return chained_attention(q, cache, jnp.int32(1), policy, kernels, sound)[:3]

    clean = []
    for _ in range(2):  # a plan, and the step after it
        clean.append((cache, run(lambda q, c: attend(q, c, kernels()), q, cache)))
        cache = cache.replace(plan=cache.plan.at[1].set(clean[-1][1][2]))
    shuffled()
    for cache, found in clean:
        jax.tree.map(
            np.testing.assert_array_equal, run(lambda q, c: attend(q, c, as_the_kernels_leave_it(kernels())), q, cache),
            found,
        )  # fmt: skip


@EVERY
@pytest.mark.parametrize("lengths", [(1535, 1157), (1279, 1151)])
def test_the_token_is_there_when_it_is_read(name, lengths):
    """The one that matters most, in an open block and at the end of one: in the windows, and in tier 2 when dense reads
    it."""
    cache, q = problem(64)
    cache, policy = cache.replace(length=jnp.array(lengths)), Policy.budget(block_size=128, **POLICIES[name])
    k, v = jax.random.normal(jax.random.key(9), (2, B, H, 64))
    k, v = 3 * q.mean(2), v + 4

    def attend(q, cache, token=None):
        sound = jnp.ones(B, bool)
        return chained_attention(q, cache.counting(), jnp.int32(1), policy, kernels(), sound, token=token)

    def before(q, cache):
        cache = cache.write(k, v, jnp.int32(1))
        return *attend(q, cache)[:3], cache

    def beside(q, cache):
        *found, seen = attend(q, cache, (k, v))
        return *found, seen.replace(length=cache.length)

    want, got = run(before, q, cache), run(beside, q, cache)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    out, certificate, _, after = got
    if name == "dense":
        assert (certificate.rung == 3).all()
    error = np.linalg.norm(out - exact(q, after, np.array(lengths) + 1), axis=-1)
    assert (error <= f64(certificate.e_total)).all()


def fits():
    """A kernel of `fits_as_it_is` alone."""
    import triton
    import triton.language as tl

    from pallas_kernels.judge.contract import fits_as_it_is

    globals().update(tl=tl, fits_as_it_is=fits_as_it_is)  # where a kernel looks for names

    @triton.jit
    def of_one_row(
        norm, bound, found, HEADS: tl.constexpr, HEADS_UP: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr,
        RELATIVE_TO: tl.constexpr, TOLERANCE: tl.constexpr, POOLED: tl.constexpr,
    ):  # fmt: skip
        row, col = tl.arange(0, HEADS_UP)[:, None], tl.arange(0, C)[None]
        shown = (row < HEADS) & (col < GROUP)
        norms = tl.load(norm + row * C + col, mask=shown, other=0.0)
        bounds = tl.load(bound + row * C + col, mask=shown, other=0.0)
        kept = fits_as_it_is(norms, bounds, shown, TOLERANCE, RELATIVE_TO, POOLED, HEADS * GROUP)
        tl.store(found, kept.to(tl.int32))

    return of_one_row


@pytest.mark.parametrize(
    "terms", [{}, dict(allotment="equal"), dict(relative_to="head"), dict(relative_to="absolute")], ids=str
)
def test_a_row_that_is_kept_as_it_is_keeps_its_tolerance(terms):
    """At the border, where sums in another order fall on the other side; with what is not finite in between."""
    from pallas_kernels.judge.contract import Contract

    policy, rng, kernel, kept = Policy.budget(0.3, block_size=128, **terms), np.random.default_rng(1), fits(), []
    for trial in range(120):
        heads, group = int(rng.choice([1, 3, 8])), int(rng.choice([1, 5, 8]))
        contract = Contract(heads, group, policy.relative_to, policy.tolerance, policy.pooled)
        norm, bound = (rng.uniform(low, 2, (heads, group)) * 10.0 ** (trial % 5 * 6 - 12) for low in (0.5, 0.1))
        if policy.relative_to == "layer":
            size = np.sqrt(np.mean(bound**2)) if policy.pooled else bound.max()
            border = 0.3 * np.sqrt(np.mean(norm**2) * (1 - 2.0**-14)) / size
        else:
            border = (0.3 * (norm if policy.relative_to == "head" else 1) / bound).min()
        bound = bound * border * (1 + rng.integers(-3, 4) * 2.0**-23)
        if trial % 7 == 0:
            (norm if trial % 2 else bound)[rng.integers(heads), rng.integers(group)] = rng.choice([np.nan, np.inf])
        shapes, columns = [jax.ShapeDtypeStruct((1,), jnp.int32)], 16
        rows = (jnp.pad(jnp.asarray(x, jnp.float32), ((0, 0), (0, columns - group))) for x in (norm, bound))
        (found,) = launch(kernel, *rows, out=shapes, grid=(1,), GROUP=group, C=columns, **contract.constants)
        norm, bound = (jnp.asarray(x, jnp.float32)[None] for x in (norm, bound))
        if int(found[0]) and np.isfinite(norm).all():
            assert (bound <= allotted(policy, norm, bound)).all()
        kept.append(int(found[0]))
    assert 10 < sum(kept) < 110


@pytest.mark.skipif(ON_GPU, reason="with twins in place of the kernels that the interpreter does not run")
@pytest.mark.parametrize("mode, policy", [
    ("certified", Policy.budget(0.05, block_size=128)), ("certified", Policy.observe(block_size=128)),
    ("naive", Policy.budget(0.05, block_size=128)),
], ids=["budget", "observe", "naive"])  # fmt: skip
def test_a_step_stores_its_token(monkeypatch, mode, policy):
    """In a chain as without one: in the windows, and of tier 2 its place in every layer and nothing else."""
    config = dataclasses.replace(small_model().config, dtype="float32")
    params = init_params(config, jax.random.key(0))
    keys = jax.random.normal(jax.random.key(1), (2, 2, 2, 512, 64)).astype(jnp.bfloat16)
    lengths = np.array([300, 511])
    cache = TieredKVCache.from_prefill(keys, keys[::-1], policy, lengths=jnp.array(lengths), capacity=512)
    step = functools.partial(decode.step, config, mode)
    _, want, *_ = run(functools.partial(step, dataclasses.replace(policy, backend="reference")), params, cache,
                      jnp.zeros(2, jnp.int32))  # fmt: skip
    monkeypatch.setattr("certjax.fused.dispatch._device", lambda: ("gpu", "9.0"))
    chained = dataclasses.replace(dispatch.reference_kernels(), chained=True)
    monkeypatch.setattr("certjax.fused.dispatch.mosaic_kernels", lambda n_heads: chained)
    _, got, *_ = run(functools.partial(step, policy), params, cache, jnp.zeros(2, jnp.int32))
    for name in ("host_keys", "host_values", "ring_keys", "ring_values", "sink_keys", "sink_values"):
        old, new, other = (f64(getattr(x, name)) for x in (cache, got, want))
        if name.startswith("host"):
            changed = (old != new).any((0, 2, 4))  # [b, N]
            np.testing.assert_array_equal(changed, np.arange(512) == lengths[:, None])
        np.testing.assert_array_equal(new[0], other[0])  # before any attention
        np.testing.assert_allclose(new, other, rtol=0.02, atol=0.02)

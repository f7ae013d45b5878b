"""The chain of kernels that a certified step is on a GPU, against the same step with its twins in between.

Without a GPU Triton's kernels are interpreted (`conftest.py`) and the others are their twins.
"""

import dataclasses
import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from certjax import Policy, TieredKVCache
from certjax.certificate import Certificate
from certjax.fused import operands as ops
from certjax.fused.append import token_of, with_windows
from certjax.fused.attention import fused_attention
from certjax.fused.chain import chained_attention
from certjax.fused.dispatch import kernels_of, kernels_of_device
from certjax.fused.ladder import heads_to_give_up
from certjax.fused.project import in_kernels
from pallas_kernels import dispatch
from pallas_kernels import levels as lv
from pallas_kernels import query as qr
from pallas_kernels.launch import launch
from tests.oracle import f64

pytest.importorskip("triton", reason="Triton's interpreter, or Triton for the GPU, is not installed")
ON_GPU = jax.default_backend() == "gpu"
B, H, N = 2, 2, 1536
LENGTHS = jnp.array([1536, 1157])
GROUPS = {64: 4, 128: 6}
POLICIES = {
    "everything read": dict(tolerance=0.3),
    "some read": dict(tolerance=0.6),
    "dense": dict(tolerance=0.002),
    "of the head": dict(tolerance=0.4, relative_to="head"),
    "equal": dict(tolerance=0.4, allotment="equal"),
    "absolute": dict(tolerance=0.1, relative_to="absolute"),
    "promoting": dict(tolerance=0.25, host_price=0.01, max_promoted=1.0),
}


@pytest.fixture(autouse=True)
def maxima_ignore_nan_as_on_a_gpu(monkeypatch):
    """Of two numbers; of an array's, Triton's interpreter does so by itself."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    for name, f in (("create_maxnumf", np.fmax), ("create_minnumf", np.fmin)):
        monkeypatch.setattr(interpreter.InterpreterBuilder, name, lambda self, a, b, f=f: self.binary_op(a, b, f))


@functools.cache
def problem(d: int):
    """A stacked cache of two layers, and queries; each KV head has a needle."""
    a, b, c = jax.random.split(jax.random.key(d), 3)
    q = jax.random.normal(c, (B, H, GROUPS[d], d))
    keys, values = (jax.random.normal(k, (2, B, H, N, d)) for k in (a, b))
    keys = keys.at[:, :, :, 400].set(2 * q.mean(2)).astype(jnp.bfloat16)
    values = (values + 0.5).astype(jnp.bfloat16)
    policy = Policy.budget(0.05, block_size=128)
    build = jax.jit(lambda k, v: TieredKVCache.from_prefill(k, v, policy, lengths=LENGTHS, capacity=N))
    return build(keys, values), q


def step(attend, q, cache, policy, sound=(True, True), seen=None, layer=1):
    """Output, certificate and the plan after it; the plans that are read by, and their counts, go to the list
    `seen`: that of the step before, and a new one."""
    plain = kernels = kernels_of(kernels_of_device(), B * H) if ON_GPU else dispatch.reference_kernels()

    def recorded(kernel):
        def attend(layer, words, counts, *rest):
            place = len(seen)
            seen.append(None)
            jax.debug.callback(lambda *x: seen.__setitem__(place, tuple(map(np.asarray, x))), words, counts)
            return kernel(layer, words, counts, *rest)

        return attend

    if seen is not None:
        kernels = dataclasses.replace(plain, fine_again=recorded(plain.fine_again), scan_and_fine=None)
    run = jax.jit(lambda q, cache: attend(q, cache, jnp.int32(layer), policy, kernels, jnp.array(sound)))
    out, certificate, plan, *_ = run(q, cache)
    return f64(out), jax.tree.map(lambda x: np.asarray(x, np.float64), certificate), np.asarray(plan)


def exact(q, cache, lengths=LENGTHS):
    """Attention over the originals of layer 1 in float64."""
    k, v = (f64(x[1]) for x in (cache.host_keys, cache.host_values))
    s = np.einsum("bhgd,bhnd->bhgn", f64(q), k) / np.sqrt(k.shape[-1])
    s = np.where(np.arange(N) < np.asarray(lengths)[:, None, None, None], s, -np.inf)
    w = np.exp(s - s.max(-1, keepdims=True))
    return np.einsum("bhgn,bhnd->bhgd", w / w.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("d, name", [*((128, name) for name in POLICIES), (64, "promoting")])
def test_chain_returns_what_its_twins_return(d, name):
    cache, q = problem(d)
    policy = Policy.budget(block_size=128, **POLICIES[name])
    plan = cache.plan if name == "everything read" else 0 * cache.plan  # no values, which does not hold
    # A second step goes by the plan that the first has made; twice, as Triton's interpreter takes its time.
    for first in (True, False) if name in ("some read", "promoting") else (True,):
        plan = cache.plan.at[1].set(compare(q, cache.replace(plan=plan), policy, name, first))


def compare(q, cache, policy, name, first):
    seen = []
    (out, got, plan), (want_out, want, want_plan) = (
        step(f, q, cache, policy, seen=seen) for f in (chained_attention, fused_attention)
    )
    assert (np.linalg.norm(out - exact(q, cache), axis=-1) <= got.e_total).all()
    jax.effects_barrier()
    assert len(seen) == 4
    again = seen[1][1][:, 0] > 0
    assert again.any() == (first and name != "everything read" or name == "dense"), again
    for words, counts in (seen[0], tuple(x[again] for x in seen[1]), seen[2]):  # what is read and judged go by either
        level = lv.level_of(words)
        np.testing.assert_array_equal(counts[:, 1:5], np.stack([(level == i).sum(1) for i in (1, 2, 3, 4)], 1))
        assert ((lv.pieces_of(words) > 0) <= (level == lv.PROMOTED)).all()
    assert (seen[1][1][~again] == 0).all() and (plan == want_plan).mean() > 0.95
    expected = {"dense": {3}, "promoting": {2}}.get(name, {0, 2})
    assert set(got.rung.ravel()) <= expected
    np.testing.assert_allclose(out, want_out, rtol=0, atol=(2e-5 if name == "dense" else 2e-2) * np.abs(want_out).max())
    for field in dataclasses.fields(Certificate):
        a, b = getattr(got, field.name), getattr(want, field.name)
        levels = "n_key_refined", "n_value_refined", "n_value_skipped"
        if all((getattr(want, x) == getattr(got, x)).all() for x in levels):
            np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-6, err_msg=field.name)
    return plan


def test_plans_of_several_chunks_of_tiles_are_their_twins_plans():
    """134 tiles, most of those with a needle promoted in pieces, two sequences."""
    d, n = 64, 134 * 128
    a, b, c, e = jax.random.split(jax.random.key(3), 4)
    q = jax.random.normal(c, (2, 1, 4, d))
    keys, values = (jax.random.normal(k, (1, 2, 1, n, d)) for k in (a, b))
    needles = jax.random.choice(e, n, (60,), replace=False)
    keys = keys.at[:, :, :, needles].set(3 * q.mean(2)[:, :, None]).astype(jnp.bfloat16)
    policy = Policy.budget(0.03, block_size=128, max_promoted=1.0)
    build = jax.jit(lambda k, v: TieredKVCache.from_prefill(k, v, policy, lengths=jnp.array([n, n - 700]), capacity=n))
    cache = build(keys, (values + 0.5).astype(jnp.bfloat16))
    found = []
    for attend in (chained_attention, fused_attention):
        seen = []
        out, certificate, _ = step(attend, q, cache, policy, seen=seen, layer=0)
        jax.effects_barrier()
        found.append((*seen[1], certificate.bytes_paged_in, certificate.e_total, out))
    (words, counts, paged, *_), pieces = found[0], np.asarray(lv.promoted_pieces(found[0][0], d)).sum(2)
    assert ((pieces > 0).sum(1) > 16).all() and (pieces[:, 128:] > 0).any() and (pieces == 1).any()
    np.testing.assert_array_equal(words[:, :134], found[1][0])
    np.testing.assert_array_equal(counts, found[1][1])
    np.testing.assert_array_equal(paged, found[1][2])
    np.testing.assert_array_equal(paged[:, 0, 0], pieces.sum(1) * lv.tokens_of_a_piece(d) * 4 * d)
    np.testing.assert_allclose(found[0][3], found[1][3], rtol=2e-2)  # the twin counts more additions
    np.testing.assert_allclose(found[0][4], found[1][4], rtol=0, atol=1e-3 * np.abs(found[1][4]).max())


def prepared(cache, q, **token):
    from pallas_kernels.prepare.triton import prepare_queries

    common = ops.shared(cache)
    return prepare_queries(
        q, ops.by_head(cache.stats.key_centre), common.largest, ops.rotation_matrix(q.shape[-1]), jnp.array([1]),
        (common.words, common.counts, common.summary), vanished=ops.VANISHED, room=ops.ROOM,
        tensor_unit=ops.TENSOR_UNIT, **token,
    )  # fmt: skip


def test_queries_are_prepared_to_the_bit():
    cache, q = problem(128)
    common = ops.shared(cache)
    layer = ops.layer_of(cache, jnp.int32(1), common)
    want = jax.jit(ops.prepare)(q.reshape(B * H, -1, 128), layer)
    got, facts, plan, arrived, _ = jax.jit(functools.partial(prepared, cache))(q.reshape(B * H, -1, 128))
    assert (arrived == 0).all()
    jax.tree.map(np.testing.assert_array_equal, plan, [layer.words, layer.counts, layer.summary])
    apart = np.abs(f64(qr.value(qr.Fixed(got.parts, want.kernel.numbers[:, 0] * 0 + 1, None)))
                   - f64(qr.value(qr.Fixed(want.kernel.parts, want.kernel.numbers[:, 0] * 0 + 1, None))))  # fmt: skip
    assert apart.max() <= 1  # a step, where sums that end beside a half were rounded differently
    np.testing.assert_array_equal(got.wide[:, 3:], want.kernel.wide[:, 3:])
    np.testing.assert_allclose(got.numbers, want.kernel.numbers, rtol=1e-5, atol=1e-5)
    for i, name in enumerate(("norm", "eps", "eps_original", "reference")):
        np.testing.assert_allclose(qr.distinct(facts[:, i], 1), getattr(want, name), rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("batch, n, d", [(1, 256, 96), (17, 200, 40)])
def test_projection_is_a_product_and_is_done_again_where_something_was_revised(biased, batch, n, d):
    from pallas_kernels.project import reference

    a, b, c, e = jax.random.split(jax.random.key(batch), 4)
    x, other = jax.random.normal(a, (2, batch, n))
    w = jax.random.normal(b, (3, n, d), jnp.bfloat16)
    bias = jax.random.normal(c, (3, d), jnp.bfloat16) if biased else None
    weights = {"kernel": w} | ({"bias": bias} if biased else {})
    project, again = in_kernels(weights, jnp.int32(2))

    def right(y, x):
        """Within the roundings of `x` and of the result to bfloat16, which Triton's interpreter cuts off."""
        want = f64(x) @ f64(w[2]) + (f64(bias[2]) if biased else 0.0)
        return (np.abs(f64(y[:, 0]) - want) <= 2.0**-7 * (np.abs(f64(x)) @ np.abs(f64(w[2])) + 2 * np.abs(want))).all()

    sums, revised_sums = jax.jit(project)(x), jax.jit(project)(other)
    nothing, something = jnp.zeros(5, jnp.int32), jnp.zeros(5, jnp.int32).at[3].set(1)
    y, z = (jax.jit(again)(sums, other, revised) for revised in (nothing, something))
    assert right(y, x) and right(z, other) and not right(z, x)
    np.testing.assert_array_equal(jax.jit(again)(revised_sums, x, nothing), z)  # the same sums, in the same order

    # Of operands in bfloat16, which the interpreter would not round to.
    exact = [v.astype(jnp.bfloat16).astype(jnp.float32) for v in (x, other)]
    for revised in (nothing, something):
        found = jax.jit(again)(jax.jit(project)(exact[0]), exact[1], revised)
        twin = reference.project_again(reference.project(exact[0], w, 2), exact[1], w, bias, 2, revised)
        np.testing.assert_allclose(f64(found[:, 0]), f64(twin), rtol=2.0**-6, atol=0.1)


def by_itself(cache, k, v):
    from pallas_kernels.append.triton import append_to_windows

    return append_to_windows(token_of(cache, k, v), jnp.array([1]))


def with_the_queries(cache, k, v):
    return prepared(cache, jnp.ones((B * H, GROUPS[64], 64)), token=token_of(cache, k, v))[-1]


@pytest.mark.parametrize("append", [by_itself, with_the_queries])
def test_append_in_a_kernel_is_write(append):
    """Into a block that is open, into one that it opens, while the sink is being filled, and beyond the end."""
    cache, _ = problem(64)
    k, v = jax.random.normal(jax.random.key(5), (2, B, H, 64))
    for lengths in ([1535, 1152], [1280, 77], [1536, 128], [0, 127]):
        before = cache.replace(length=jnp.array(lengths))
        want = jax.jit(lambda c, k, v: c.write(k, v, jnp.int32(1)))(before, k, v)
        got = jax.jit(lambda c, k, v: with_windows(c, append(c, k, v)))(before.counting(), k, v)
        after = jnp.nan if lengths[0] == 1280 else jnp.int32(7)
        write = jax.jit(lambda c, k, v, after: c.write_originals(k, v, jnp.int32(1), after))
        got = write(got, k, v, after).replace(length=before.length)
        jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_row_that_failed_is_dense():
    cache, q = problem(64)
    out, certificate, _ = step(chained_attention, q, cache, Policy.budget(0.3, block_size=128), sound=(True, False))
    assert set(certificate.rung[0].ravel()) == {0} and set(certificate.rung[1].ravel()) == {4}
    assert not certificate.precondition_ok[1].any() and certificate.precondition_ok[0].all()
    np.testing.assert_allclose(out[1], exact(q, cache)[1], rtol=0, atol=1e-4)


def test_kernels_translate_for_a_gpu_without_one():
    """Into Triton's intermediate language, in a process of its own that does not interpret."""
    program = """
import jax, jax.numpy as jnp
from certjax import Policy
from certjax.fused.chain import chained_attention
from certjax.fused.project import in_kernels
from pallas_kernels import launch
from pallas_kernels.dispatch import mosaic_kernels, triton_kernels
from tests.test_chain import B, GROUPS, H, accumulated, problem
translated, found = launch._translated, set()
def recorded(kernel, *rest):
    text = translated(kernel, *rest)
    found.update((onto, kernel.__name__) for onto in accumulated(text))
    return text
launch._translated = recorded
for d, kernels in [(d, f(B * H)) for f in (mosaic_kernels, triton_kernels) for d in GROUPS]:
    policy = Policy.budget(0.05, block_size=128)
    q, cache = (jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), x) for x in problem(d)[::-1])
    def f(q, c, w, token):
        project, again = in_kernels({"kernel": w, "bias": w[:, 0]}, jnp.int32(1))
        flat = lambda out: out.reshape(B, -1)
        more = dict(project=lambda x: project(flat(x)), again=lambda y, x, revised: again(y, flat(x), revised))
        more["token"] = token
        return chained_attention(q, c, jnp.int32(1), policy, kernels, jnp.ones(B, bool), **more)
    w = jax.ShapeDtypeStruct((2, H * GROUPS[d] * d, 128), jnp.bfloat16)
    token = (jax.ShapeDtypeStruct((B, H, d), jnp.bfloat16),) * 2
    for stored in (token, None):
        text = jax.jit(f).trace(q, cache, w, stored).lower(lowering_platforms=("cuda",)).as_text()
        print(text.count("custom_call @__gpu$xla.gpu.triton"), text.count("mosaic_gpu_v2"))
for onto in ("sum", "product"):
    print(*sorted(name for what, name in found if what == onto))
"""
    environment = os.environ | {"TRITON_INTERPRET": "0", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    *counts, on_sums, on_products = done.stdout.strip().splitlines()
    # Bounds know of no other than these: integers that are exact, and a projection, which no bound speaks of; both
    # halves of a tile's values, and estimates.
    assert on_sums.split() == ["_prepare", "_prepare_and_append", "_project", "_project_again"]
    of_prepare = "_prepare", "_prepare_and_append"
    assert on_products.split() == ["_attend_coarse", "_attend_fine", "_offer", *of_prepare, "_scan_tiles"]
    # In Triton, too: both parts of a second pass, dense heads. All that the plan of the step before asks for is one
    # kernel on Mosaic, or two.
    assert counts == ["10 1"] * 2 * len(GROUPS) + ["12 0"] * 2 * len(GROUPS), done.stdout


def accumulated(text: str) -> set[str]:
    """What float products in Triton's intermediate language are accumulated on: a "sum", or another "product". (Triton
    makes `x + product` one of those: a matrix unit then cuts off what it adds to a large `x`.)"""
    defined, found = {}, set()  # names come again in other blocks: the last before it is what a line speaks of
    for name, line in re.findall(r"^\s*(%\w+)(?::\d+)? = (.*)$", text, re.M):
        defined[name] = line
        if line.startswith("tt.dot") and line.endswith("xf32>"):
            onto = defined.get(re.findall(r"%\w+", line)[2], "an argument of a loop")
            if not re.match(r"arith.constant dense<0.0+e\+00>", onto):
                found.add("product" if onto.startswith("tt.dot") else "sum")
    return found


@pytest.mark.parametrize("attend", [chained_attention, fused_attention])
@pytest.mark.parametrize("damage", [np.nan, np.inf, -np.inf])
def test_a_query_that_is_not_finite_has_no_certificate(attend, damage):
    cache, q = problem(64)
    out, certificate, _ = step(attend, q.at[0, 0, 1, 3].set(damage), cache, Policy.budget(0.3, block_size=128))
    assert np.isnan(out[0, 0, 1]).all() and np.isinf(certificate.e_total[0, 0, 1])
    # The rest of its row is dense, the other row as ever.
    assert np.isfinite(np.delete(out[0].reshape(-1, 64), 1, 0)).all() and (certificate.rung[0] == 4).all()
    assert not certificate.precondition_ok[0, 0, 1] and (certificate.rung[1] == 0).all()


@pytest.mark.parametrize("attend", [chained_attention, fused_attention])
def test_scores_far_below_their_reference_are_read_from_tier_1(attend):
    """One long key that no query looks at, in a window, puts the reference 60 nats above all scores of a row: squares
    of weights vanish."""
    cache, q = problem(64)
    keys, values = (jnp.asarray(np.asarray(x, np.float32)) for x in (cache.host_keys, cache.host_values))
    basis, _ = jnp.linalg.qr(q.swapaxes(-1, -2))  # [b, H, d, G]
    aside = keys[:, :, :, 1400] - jnp.einsum("bhdg,bheg,lbhe->lbhd", basis, basis, keys[:, :, :, 1400])
    keys = keys.at[:, :, :, 1400].set(100 * aside / jnp.linalg.norm(aside, axis=-1, keepdims=True))
    policy = Policy.budget(0.3, block_size=128)
    build = jax.jit(lambda k, v: TieredKVCache.from_prefill(k, v, policy, lengths=LENGTHS, capacity=N))
    far = build(keys.astype(jnp.bfloat16), values.astype(jnp.bfloat16))
    out, certificate, _ = step(attend, q, far, policy)
    assert (certificate.rung < 3).all() and (certificate.n_value_skipped < 11).any()
    assert (np.linalg.norm(out - exact(q, far), axis=-1) <= certificate.e_total).all()


@functools.cache
def decide():
    """A kernel of `decide_row` alone."""
    import triton
    import triton.language as tl

    from pallas_kernels.judge.verdict import decide_row

    globals().update(tl=tl, decide_row=decide_row)  # where a kernel looks for names

    @triton.jit
    def of_one_row(
        record, counts, sound, dense, HEADS: tl.constexpr, HEADS_UP: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr,
        RELATIVE_TO: tl.constexpr, TOLERANCE: tl.constexpr, POOLED: tl.constexpr,
    ):  # fmt: skip
        decide_row(0, record, counts, sound, dense, HEADS, HEADS_UP, GROUP, C, RELATIVE_TO, TOLERANCE, POOLED)

    return of_one_row


def decided(norm, bound, policy):
    """Heads that go dense `[H]`, of one row, with these norms and bounds of candidates: `decide_row` and its twin."""
    from pallas_kernels.judge import record as rc
    from pallas_kernels.judge.contract import Contract

    heads, group = norm.shape
    rows = jnp.zeros((heads, rc.ROWS.value, 2 * group)).at[:, rc.PASSED.value].set(1.0)
    rows = rows.at[:, rc.NORM.value].set(jnp.tile(norm, 2)).at[:, rc.E_TOTAL.value].set(jnp.tile(bound, 2))
    contract = Contract(heads, group, policy.relative_to, policy.tolerance, policy.pooled)
    counts = jnp.zeros((heads, lv.COUNTS), jnp.int32)
    goes = launch(
        decide(), rows, counts, jnp.ones(1, bool), out=jax.ShapeDtypeStruct((heads,), jnp.int32), grid=(1,),
        GROUP=group, C=2 * group, **contract.constants,
    )  # fmt: skip
    twin = heads_to_give_up(policy, norm[None], bound[None], jnp.zeros((1, heads), bool))[0]
    return np.asarray(goes), np.asarray(twin)


@pytest.mark.parametrize("allotment", ["pooled", "equal"])
@pytest.mark.parametrize("scale", [2.0**-60, 1.0, 2.0**63])
def test_decision_at_the_ends_of_float32(scale, allotment):
    policy = Policy.budget(0.05, block_size=128, allotment=allotment)
    norm = scale * jnp.ones((4, 4))
    for bound, want in ((0.04, 0), (0.06, 1), (np.inf, 1)):
        verdict, twin = decided(norm, scale * bound * jnp.ones((4, 4)), policy)
        assert (verdict == want).all() and (twin == want).all(), (bound, verdict, twin)
    uneven = norm * jnp.exp2(-8.0 * jnp.arange(4))[:, None]
    verdict, twin = decided(uneven, 0.02 * norm.at[3].multiply(4), policy)
    assert verdict[3] == 1 and (verdict == twin).all()


@pytest.mark.parametrize("leaf", ["kappa", "eta", "nu", "k_norm", "rho_k", "rho_v"])
def test_a_damaged_annotation_costs_dense_attention(leaf):
    """Of a tile that is read: whatever is not a number there must not end in a finite bound that is wrong."""
    cache, q = problem(64)
    for damage in (np.nan, np.inf):
        note = getattr(cache.notes, leaf)
        if leaf in ("k_norm", "rho_k", "rho_v"):
            note = note.at[1, 0, 0, 4].set(damage)
        else:
            note = note.replace(peak=note.peak.at[1, 0, 0, 4].set(damage))
        damaged = cache.replace(notes=cache.notes.replace(**{leaf: note}))
        out, certificate, _ = step(chained_attention, q, damaged, Policy.budget(0.3, block_size=128))
        assert (np.linalg.norm(out - exact(q, cache), axis=-1) <= certificate.e_total).all()
        assert np.isfinite(out).all() and (certificate.rung[1] == 0).all()

"""The engine on a tiny random model: one prefill for all modes, teacher forcing, and what is kept of certificates."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from certjax import ContextLengthError, InvalidArgumentError, decode, generate
from certjax.certificate import empty_certificate
from certjax.eval import engine
from certjax.eval.modes import EvalMode, parse_mode
from certjax.eval.tally import Tally, step_bounds, summaries
from certjax.models.llama.config import LlamaConfig
from certjax.plugs import make_cache
from certjax.sampling import Sampling
from tests.eval import tiny_model
from tests.eval.tiny_model import BUDGET, CONFIG, CONTEXT, NAIVE
from tests.models import tiny

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROWS = [tiny.tokens(CONFIG, n, seed=n).tolist() for n in (240, 150)]
HELD, STEPS, NEW = (200, 119), 24, 12
RAW_NAIVE = EvalMode("raw", "naive", parse_mode(NAIVE).policy)
PAPER = "paper:k_max=4"


@pytest.fixture(scope="module")
def model():
    return tiny_model.model()


@pytest.fixture(scope="module")
def prefilled(model):
    return engine.prefill(model, [row[:n] for row, n in zip(ROWS, HELD, strict=True)], CONTEXT)


def scored(model, mode, prefilled, rows=(0, 1), steps=STEPS):
    mode = parse_mode(mode) if isinstance(mode, str) else mode
    fed = [ROWS[r][HELD[r] : HELD[r] + steps] for r in rows]
    targets = [ROWS[r][HELD[r] + 1 : HELD[r] + steps + 1] for r in rows]
    return engine.score(model, mode, prefilled, fed, targets)


def answers(model, mode, prefilled):
    mode = parse_mode(mode) if isinstance(mode, str) else mode
    return engine.answer(model, mode, prefilled, NEW)


@pytest.fixture(scope="module")
def results(model, prefilled):
    """`results(mode)`: scores of both rows in one batch. Made once."""
    made = {}

    def of(mode):
        label = mode if isinstance(mode, str) else mode.label
        if label not in made:
            made[label] = scored(model, mode, prefilled)
        return made[label]

    return of


# -- teacher forcing ----------------------------------------------------------------------------------


def test_dense_nll_is_that_of_the_prefill_at_every_position(model, results):
    row, start = ROWS[0], HELD[0]
    lengths = jnp.arange(start + 1, start + STEPS + 1, dtype=jnp.int32)
    tokens = jnp.broadcast_to(jnp.asarray(row + [0] * (CONTEXT - len(row)), jnp.int32), (STEPS, CONTEXT))
    _, logits = decode.fill(CONFIG, CONTEXT, model.params, tokens, lengths)
    expected = -jax.nn.log_softmax(logits)[jnp.arange(STEPS), jnp.asarray(row[start + 1 : start + STEPS + 1])]
    of = results("dense")[0]
    np.testing.assert_allclose(of.nll, expected, rtol=1e-4)
    assert of.greedy == (logits.argmax(-1) == jnp.asarray(row[start + 1 : start + STEPS + 1])).tolist()
    assert of.certificate is None and of.bound is None


def test_compressed_losses_differ_from_dense_ones_and_little(results):
    """That the mode's own cache is read."""
    for mode in (NAIVE, BUDGET):
        gap = np.abs(np.subtract(results(mode)[0].nll, results("dense")[0].nll))
        assert 0 < gap.max() < 0.3


def test_row_gets_the_same_whatever_the_other_rows(model, results):
    twice = engine.prefill(model, [ROWS[1][: HELD[1]]] * 2, CONTEXT)
    for mode in ("dense", BUDGET):
        of, alike = scored(model, mode, twice, rows=(1, 1))
        together = results(mode)[1]
        assert of.nll == alike.nll
        np.testing.assert_allclose(of.nll, together.nll, rtol=1e-5)
        if mode == BUDGET:
            assert of.certificate.rungs == together.certificate.rungs
            np.testing.assert_allclose(of.bound, together.bound, rtol=1e-3)


def test_rows_of_different_lengths_are_scored_to_their_own_ends(model, prefilled, results):
    fed = [ROWS[0][HELD[0] : HELD[0] + STEPS], ROWS[1][HELD[1] : HELD[1] + 5]]
    targets = [ROWS[0][HELD[0] + 1 : HELD[0] + STEPS + 1], ROWS[1][HELD[1] + 1 : HELD[1] + 6]]
    long, short = engine.score(model, parse_mode(BUDGET), prefilled, fed, targets)
    assert long.nll == results(BUDGET)[0].nll
    assert short.nll == results(BUDGET)[1].nll[:5] and len(short.bound) == 5
    assert short.certificate.head_steps == 5 * CONFIG.n_layers * CONFIG.n_heads


def test_interrupted_between_calls_or_not_the_losses_are_the_same(model, prefilled, results, monkeypatch):
    monkeypatch.setattr(engine, "STEPS", 7)
    assert [of.nll for of in scored(model, NAIVE, prefilled)] == [of.nll for of in results(NAIVE)]


# -- naive, with its certificate ----------------------------------------------------------------------


def test_naive_with_its_certificate_is_naive(results):
    for of, raw in zip(results(NAIVE), results(RAW_NAIVE), strict=True):
        np.testing.assert_allclose(of.nll, raw.nll, rtol=1e-5)
        assert of.certificate.rungs[0] == of.certificate.head_steps and of.certificate.checks_failed == 0
        assert of.certificate.before_max == of.certificate.bound_max > 0


def test_failed_check_makes_naive_dense_and_is_counted(model, prefilled):
    """A key too large for its scores to be finite."""
    keys = prefilled.cache.keys.at[0, 0, 0, 3].set(3e38)
    broken = dataclasses.replace(prefilled, cache=prefilled.cache.replace(keys=keys))
    of = scored(model, NAIVE, broken)[0].certificate
    assert of.rungs[4] > 0 and of.checks_failed > 0 and sum(of.rungs) == of.head_steps


# -- greedy decoding ----------------------------------------------------------------------------------


def test_dense_answers_are_what_generate_says(model, prefilled):
    prompts = [row[:n] for row, n in zip(ROWS, HELD, strict=True)]
    expected = generate(model, prompts, max_new_tokens=NEW, mode="dense")
    assert [of.tokens for of in answers(model, "dense", prefilled)] == [row.tolist() for row in expected.tokens]


def test_answers_summarize_the_certificates_of_their_steps(model, prefilled):
    policy, n = parse_mode(PAPER).policy, NEW - 1
    way = (CONFIG, "certified", policy, Sampling())
    cache = jax.jit(make_cache, static_argnums=(0, 1))("certified", policy, prefilled.cache)
    state = decode.begin(
        CONFIG, "certified", Sampling(), n, decode.Telemetry, cache, prefilled.logits, jax.random.key(0)
    )
    state = decode.run(*way, model.params, state, jnp.int32(NEW))
    found = answers(model, PAPER, prefilled)
    assert [of.tokens for of in found] == state.tokens.tolist()
    record = jax.tree.map(np.asarray, state.telemetry.certificate)
    assert record.rung.max() > 0
    norm = np.sqrt((record.out_norm.astype(np.float64) ** 2).mean(-1, keepdims=True))  # [T, L, b, 1]
    before, bound = record.e_total_candidate / norm, record.e_total / norm
    paper = (record.e_key_paper_candidate + record.e_val_paper_candidate) / norm
    for row, of in enumerate(answer.certificate for answer in found):
        assert of.head_steps == n * CONFIG.n_layers * CONFIG.n_heads
        assert of.rungs == np.bincount(record.rung[:, :, row].ravel(), minlength=5).tolist()
        layers = np.sqrt((before[:, :, row] ** 2).mean(-1))
        for name, x in (("bound", bound[:, :, row]), ("before", before[:, :, row]), ("before_layer", layers),
                        ("before_paper", paper[:, :, row])):  # fmt: skip
            np.testing.assert_allclose(getattr(of, f"{name}_mean"), x.mean(), rtol=1e-5)
            np.testing.assert_allclose(getattr(of, f"{name}_max"), x.max(), rtol=1e-5)
        np.testing.assert_allclose(of.bytes_read, record.bytes_read[:, :, row].sum() / n, rtol=1e-5)
        np.testing.assert_allclose(of.bytes_paged_in, record.bytes_paged_in[:, :, row].sum() / n, rtol=1e-5)
        np.testing.assert_allclose(of.bound_by_head, before[:, :, row].mean(0), rtol=1e-5)
        np.testing.assert_allclose(of.dense_by_head, (record.rung[:, :, row] >= 3).mean(0), rtol=1e-6)
        promoted = (record.k_star + record.n_value_promoted)[:, :, row]
        np.testing.assert_allclose(of.promoted_by_head, promoted.mean(0), rtol=1e-6)
        token = 2 * CONFIG.n_layers * CONFIG.n_kv_heads * CONFIG.head_dim * 4
        assert of.bytes_dense == token * np.mean([HELD[row] + i + 1 for i in range(n)])


def test_modes_leave_the_prefilled_cache_to_the_next(model, prefilled):
    before = np.asarray(prefilled.cache.keys)
    first = answers(model, "dense", prefilled)
    scored(model, "dense", prefilled)
    np.testing.assert_array_equal(prefilled.cache.keys, before)
    assert [of.tokens for of in answers(model, "dense", prefilled)] == [of.tokens for of in first]


def test_what_a_mode_does_at_a_context_is_one_program(model, prefilled):
    mode = parse_mode("naive:codec=int8_int8")
    scored(model, mode, prefilled)
    asked = engine._Asked.answering(len(prefilled.lengths), engine.ROOM)
    state = engine._open(model.config, mode.kind, mode.policy, asked, prefilled.cache, prefilled.logits)
    run = engine._run.program(model.config, mode.kind, mode.policy, model.params, state, asked, 0)
    programs = run._cache_size(), engine._open._cache_size()
    for new in (1, NEW, 40):
        engine.answer(model, mode, prefilled, new)
    scored(model, mode, prefilled, steps=5)
    assert programs == (run._cache_size(), engine._open._cache_size())


def test_answer_ends_with_the_end_of_sequence_token(model, prefilled):
    whole = answers(model, "dense", prefilled)
    for at in (0, 3):
        end = whole[0].tokens[at]
        config = dataclasses.replace(model.config, eos_token_ids=(end,))
        ended = answers(dataclasses.replace(model, config=config), "dense", prefilled)
        for of, other in zip(whole, ended, strict=True):
            n = of.tokens.index(end) + 1 if end in of.tokens else NEW
            assert other.tokens == of.tokens[:n]


# -- what does not fit --------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_before_any_work(model, prefilled):
    with pytest.raises(ContextLengthError, match="512 exceeds the 256"):
        engine.check_fit(model, parse_mode("dense"), 512)
    with pytest.raises(InvalidArgumentError, match="'naive:backend=mosaic_gpu' does not fit model tiny"):
        engine.check_fit(model, parse_mode("naive:backend=mosaic_gpu"), CONTEXT)
    with pytest.raises(InvalidArgumentError, match="'paper:group_size=5' does not fit model tiny"):
        engine.check_fit(model, parse_mode("paper:group_size=5"), CONTEXT)
    engine.check_fit(model, parse_mode("budget"), CONTEXT)
    with pytest.raises(ContextLengthError, match="with 57 more it exceeds the 256"):
        engine.answer(model, parse_mode("dense"), prefilled, 57)
    with pytest.raises(ContextLengthError, match="300 tokens"):
        engine.prefill(model, [[1] * 300], CONTEXT)
    with pytest.raises(InvalidArgumentError, match="empty"):
        engine.prefill(model, [[1], []], CONTEXT)


# -- the reduction ------------------------------------------------------------------------------------


def tallied(**fields):
    """The summary and step bounds of one step of one layer of two heads."""
    config = LlamaConfig(vocab_size=4, d_model=4, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=2, d_ff=4)
    record = empty_certificate((1, 1, 2)).replace(**{k: jnp.asarray([[v]]) for k, v in fields.items()})
    tally = Tally.empty(config, "certified", 1, 3).add(record, jnp.ones(1, bool), jnp.int32(0))
    return summaries(tally, config, [5])[0], step_bounds(tally)[0]


def test_infinite_and_undefined_bounds_are_infinite():
    for e in (np.inf, np.nan):
        of, (step,) = tallied(e_total_candidate=[e, 1.0], e_key_paper_candidate=[e, 1.0], out_norm=[1.0, 1.0])
        assert of.before_max == of.before_mean == of.before_layer_max == of.before_paper_max == step == np.inf
        assert of.bound_max == 0


def test_no_steps_are_a_summary_of_zeros(prefilled):
    of = summaries(Tally.empty(CONFIG, "certified", 2, 4), CONFIG, prefilled.lengths)[1]
    assert of.head_steps == of.bound_max == of.before_mean == of.bytes_dense == 0 and of.rungs == [0] * 5


def test_norms_of_zero_allow_no_error_and_extreme_ones_do_not_overflow():
    of, _ = tallied(e_total=[0.0, 0.0], out_norm=[0.0, 0.0])
    assert of.bound_max == 0
    of, _ = tallied(e_total=[1e-9, 0.0], out_norm=[0.0, 0.0])
    assert of.bound_max == np.inf
    for unit in (1e-25, 1e25):
        of, _ = tallied(e_total=[unit, unit], out_norm=[unit, unit])
        np.testing.assert_allclose(of.bound_max, 1.0, rtol=1e-5)

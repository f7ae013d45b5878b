"""Windows of a text: which tokens are prefilled, which are scored, and by what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from certjax import InvalidArgumentError, decode
from certjax.eval.modes import parse_mode
from certjax.eval.perplexity import windows
from tests.eval import tiny_model
from tests.eval.tiny_model import CONFIG, CONTEXT, NAIVE, TEXT

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model.model(tiny_model.tokenizer(tmp_path_factory.mktemp("plain")))


@pytest.fixture(scope="module")
def beginning(tmp_path_factory):
    """The same with a beginning-of-sequence token."""
    return tiny_model.model(tiny_model.tokenizer(tmp_path_factory.mktemp("bos"), bos=True))


def test_windows_are_consecutive_pieces_of_the_text(model):
    (work,) = windows(model, {"book": TEXT}, [64], 1000)
    n = len(TEXT.encode()) // 64
    assert list(work.samples) == list(range(n)) and (work.benchmark, work.task, work.context) == ("ppl", "book", 64)
    whole = sum(work.prepare(work.samples), [])
    assert whole == model.tokenizer.encode(TEXT)[: n * 64]


def test_every_window_begins_as_the_model_wants(beginning):
    (work,) = windows(beginning, {"book": TEXT}, [64], 1000)
    (bos,) = beginning.tokenizer.encode("")
    prepared = work.prepare(work.samples)
    assert all(len(ids) == 64 and ids[0] == bos for ids in prepared)
    body = sum((ids[1:] for ids in prepared), [])
    assert body == beginning.tokenizer.encode(TEXT)[1 : 1 + len(body)] and len(body) == len(TEXT) // 63 * 63


def test_fewer_windows_are_spread_over_the_text(model):
    (work,) = windows(model, {"book": TEXT}, [64], 4)
    n = len(TEXT) // 64
    assert list(work.samples) == [0, n // 4, 2 * n // 4, 3 * n // 4]


def test_short_texts_are_left_out_and_a_context_that_fits_none_is_refused(model):
    works = windows(model, {"short": "abc", "book": TEXT}, [64, 128], 2)
    assert [(work.task, work.context) for work in works] == [("book", 64), ("book", 128)]
    with pytest.raises(InvalidArgumentError, match=f"window of 4096 tokens; the longest has {len(TEXT)}"):
        windows(model, {"short": "abc", "book": TEXT}, [64, 4096], 2)
    with pytest.raises(InvalidArgumentError, match="context 8 is too short"):
        windows(model, {"book": TEXT}, [8], 2)


def test_all_of_the_second_half_is_scored_and_by_decode_steps(model):
    (work,) = windows(model, {"book": TEXT}, [CONTEXT], 2)
    prepared = work.prepare(work.samples)
    prefilled = work.prefill(model, prepared)
    assert prefilled.lengths == [CONTEXT // 2 - 1] * 2
    some = jnp.arange(0, CONTEXT // 2, 8, dtype=jnp.int32)
    lengths = CONTEXT // 2 + some
    dense, naive = (work.run(model, parse_mode(mode), prepared, prefilled) for mode in ("dense", NAIVE))
    for ids, of, other in zip(prepared, dense, naive, strict=True):
        tokens = jnp.broadcast_to(jnp.asarray(ids, jnp.int32), (len(lengths), CONTEXT))
        logits = jax.nn.log_softmax(decode.fill(CONFIG, CONTEXT, model.params, tokens, lengths)[1])
        expected = -logits[jnp.arange(len(some)), jnp.asarray(ids)[lengths]]
        np.testing.assert_allclose(np.asarray(of["token_nll"])[some], expected, rtol=1e-4)
        assert of["token_bound"] is None and of["certificate"] is None
        assert len(other["token_nll"]) == len(other["token_bound"]) == other["new_tokens"] == CONTEXT // 2
        assert other["prompt_tokens"] == CONTEXT // 2
        assert max(other["token_bound"]) == other["certificate"].before_max > 0


def test_fewer_tokens_are_scored_after_a_longer_prefill(model):
    (half,), (last,) = windows(model, {"book": TEXT}, [CONTEXT], 2), windows(model, {"book": TEXT}, [CONTEXT], 2, 24)
    prepared = half.prepare(half.samples)
    assert last.prepare(last.samples) == prepared
    prefilled = last.prefill(model, prepared)
    assert prefilled.lengths == [CONTEXT - 25] * 2
    of_half = half.run(model, parse_mode("dense"), prepared, half.prefill(model, prepared))
    for of, whole in zip(last.run(model, parse_mode("dense"), prepared, prefilled), of_half, strict=True):
        np.testing.assert_allclose(of["token_nll"], whole["token_nll"][-24:], rtol=1e-4)
        assert (of["prompt_tokens"], of["new_tokens"]) == (CONTEXT - 24, 24)
    assert last.options() != half.options() and "scored" not in half.options()
    for scored in (0, CONTEXT - 1):
        with pytest.raises(InvalidArgumentError, match=f"{scored} tokens of a window of {CONTEXT} cannot be scored"):
            windows(model, {"book": TEXT}, [CONTEXT], 2, scored)


def test_options_tell_texts_apart(model, beginning):
    def options(reader, text):
        (work,) = windows(reader, {"book": text}, [64], 1)
        return work.options()

    assert options(model, TEXT) == options(model, TEXT)
    assert options(model, TEXT) != options(model, TEXT[1:]) and options(model, TEXT) != options(beginning, TEXT)

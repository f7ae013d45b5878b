"""certjax as a model of lm-evaluation-harness, and that it says so where the harness is not installed."""

import dataclasses
import importlib.util
import json
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from certjax import CertjaxError, InvalidArgumentError, decode
from tests.eval import tiny_model
from tests.eval.tiny_model import CONFIG, CONTEXT, NAIVE

pytestmark = pytest.mark.usefixtures("quick_compilation")
with_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
SENTENCE = "It is a truth universally acknowledged, that a single man in possession of a good fortune"


def test_missing_harness_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "certjax.eval.harness", raising=False)
    for name in [name for name in sys.modules if name.startswith("lm_eval.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(CertjaxError, match="pip install lm_eval"):
        importlib.import_module("certjax.eval.harness")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model.model(tiny_model.tokenizer(tmp_path_factory.mktemp("chat"), bos=True, chat=True))


@pytest.fixture(scope="module")
def lm(model):
    """`lm(**options)`: the adapter, in dense mode unless told otherwise."""
    from certjax.eval.harness import CertjaxLM

    return lambda **options: CertjaxLM(**{"model": model, "mode": "dense", "batch_size": 2, **options})


def requests(*arguments):
    return [SimpleNamespace(args=of, arguments=of) for of in arguments]


def expected(model, context, continuation):
    """Log-likelihood and greediness by dense prefills of every prefix."""
    ids = context + continuation
    lengths = jnp.arange(len(context), len(ids), dtype=jnp.int32)
    tokens = jnp.broadcast_to(jnp.asarray(ids + [0] * (CONTEXT - len(ids)), jnp.int32), (len(lengths), CONTEXT))
    logits = decode.fill(CONFIG, CONTEXT, model.params, tokens, lengths)[1]
    said = jax.nn.log_softmax(logits)[jnp.arange(len(lengths)), jnp.asarray(continuation)]
    return float(said.sum()), bool((logits.argmax(-1) == jnp.asarray(continuation)).all())


@with_harness
def test_loglikelihood_is_that_of_the_model_whatever_the_batch(lm, model):
    asked = [("one two", " three"), ("a", "b"), ("", "xyz"), (SENTENCE, " must")]
    found = lm().loglikelihood(requests(*asked), disable_tqdm=True)
    (bos,) = model.tokenizer.encode("")
    for (context, continuation), (total, greedy) in zip(asked, found, strict=True):
        held = [bos, *context.encode()] if not context else model.tokenizer.encode(context)
        answer = expected(model, held, model.tokenizer.encode(continuation)[1:])
        np.testing.assert_allclose(total, answer[0], rtol=1e-4)
        assert greedy == answer[1]


@with_harness
def test_greedy_continuation_is_said_to_be_greedy(lm, model):
    prompt = model.tokenizer.encode(SENTENCE)
    _, logits = decode.fill(
        CONFIG, CONTEXT, model.params, jnp.asarray([prompt + [0] * (CONTEXT - len(prompt))]), jnp.asarray([len(prompt)])
    )
    best = int(logits[0].argmax())
    (of,) = lm()._loglikelihood_tokens([(None, prompt, [best])], disable_tqdm=True)
    assert of[1] and not lm()._loglikelihood_tokens([(None, prompt, [best - 1])], disable_tqdm=True)[0][1]


@with_harness
def test_scored_tokens_go_through_the_modes_own_cache(lm):
    asked = requests((SENTENCE, " must"))
    dense, naive = (lm(mode=mode).loglikelihood(asked, disable_tqdm=True)[0][0] for mode in ("dense", NAIVE))
    assert dense != naive and abs(dense - naive) < 0.5


@with_harness
def test_context_that_is_too_long_loses_its_beginning(lm, model):
    ids = model.tokenizer.encode(SENTENCE)
    (short,) = lm(max_length=40)._loglikelihood_tokens([(None, ids[:-4], ids[-4:])], disable_tqdm=True)
    np.testing.assert_allclose(short[0], expected(model, ids[-41:-4], ids[-4:])[0], rtol=1e-4)
    with pytest.raises(InvalidArgumentError, match="50 tokens; from 1 to max_length=40"):
        lm(max_length=40)._loglikelihood_tokens([(None, ids[:2], ids[:50])], disable_tqdm=True)


@with_harness
def test_rolling_loglikelihood_adds_up_disjoint_windows(lm, model):
    ids = model.tokenizer.encode(SENTENCE)
    (of,) = lm(max_length=64).loglikelihood_rolling(requests((SENTENCE,)), disable_tqdm=True)
    # The first window predicts 64 tokens after the beginning of the sequence, the second the rest after 64.
    first = expected(model, ids[:1], ids[1:65])[0]
    second = expected(model, ids[len(ids) - 65 : 65], ids[65:])[0]
    np.testing.assert_allclose(of, first + second, rtol=1e-4)


@with_harness
def test_generation_ends_before_the_first_stop_string(lm):
    def texts(*until, tokens=24):
        arguments = {"until": list(until), "max_gen_toks": tokens, "do_sample": False}
        return lm().generate_until(requests((SENTENCE, arguments), ("abc", arguments)), disable_tqdm=True)

    whole = texts()
    stop = whole[0][3:5]
    assert texts(stop, "never")[0] == whole[0][: whole[0].index(stop)]
    assert [len(text) > 0 for text in whole] == [True, True]
    alone = lm(batch_size=1).generate_until(requests(("abc", {"max_new_tokens": 24})), disable_tqdm=True)
    assert alone == whole[1:]


@with_harness
def test_what_it_cannot_do_is_refused(lm, model):
    with pytest.raises(InvalidArgumentError, match="do_sample=False"):
        lm().generate_until(requests(("abc", {"do_sample": True})), disable_tqdm=True)
    with pytest.raises(InvalidArgumentError, match="leave no room"):
        lm().generate_until(requests(("abc", {"max_gen_toks": 4000})), disable_tqdm=True)
    with pytest.raises(InvalidArgumentError, match="batch_size"):
        lm(batch_size="auto")
    with pytest.raises(InvalidArgumentError, match="does not fit model"):
        lm(mode="paper:group_size=5")
    with pytest.raises(InvalidArgumentError, match="no tokenizer"):
        lm(model=dataclasses.replace(model, tokenizer=None))


@with_harness
def test_mode_and_template_are_the_models(lm):
    of = lm(mode="budget:tolerance=0.02;codec=int8_int4")
    assert of.mode.policy.tolerance == 0.02 and of.get_model_info()["certjax_policy"]["codec"] == "int8_int4"
    history = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good"}]
    assert of.apply_chat_template(history[:1]) == "<|user|>Hello<|model|>"
    assert of.apply_chat_template(history, add_generation_prompt=False) == "<|user|>Hello<|model|>Good"
    assert of.tok_encode("ab", add_special_tokens=False) == of.tok_encode("ab")[1:]


@with_harness
def test_task_of_the_harness_runs_unchanged(lm, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    evaluator, tasks = (pytest.importorskip(f"lm_eval.{name}") for name in ("evaluator", "tasks"))
    rows = [{"question": f"{i} and {i}", "choices": [" yes", " no"], "label": i % 2} for i in range(3)]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tiny.yaml").write_text(
        f"task: tiny_choice\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.json}}}}\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: '{{question}}'\n"
        "doc_to_choice: '{{choices}}'\ndoc_to_target: label\nmetric_list: [{metric: acc}]\n"
    )
    manager = tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)
    of = evaluator.simple_evaluate(lm(mode=NAIVE), tasks=["tiny_choice"], task_manager=manager, bootstrap_iters=0)
    assert 0 <= of["results"]["tiny_choice"]["acc,none"] <= 1 and len(of["samples"]["tiny_choice"]) == 3

"""`generate` and `stream` on a tiny random model: one trace, the same tokens, where rows end, what is refused.

Prompts are longer than the policies' windows (which are off), so that tier 1 is in use. Random logits have near ties:
where a mode attends approximately (naive, paper, budget) its tokens may leave those of the dense mode at one, and
nothing here says they do not. Equality with dense is asked of the mode that promises it: every head dense.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import AddedToken, decoders, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from certjax import ContextLengthError, InvalidArgumentError, Model, Policy, decode, generate, stream
from certjax.certificate import Certificate, empty_certificate
from certjax.models.llama.modeling import init_params
from certjax.sampling import Sampling
from certjax.tokenizer import Tokenizer
from tests.models import tiny

pytestmark = pytest.mark.usefixtures("quick_compilation")

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = ["<|user|>", "<|model|>"]
# No test elsewhere has this config, so what is traced for it is traced here.
CONFIG = dataclasses.replace(
    tiny.CONFIGS["wide_heads"], n_layers=2, vocab_size=len(ALPHABET) + len(SPECIAL) + 3, context_length=611
)
PROMPTS = [tiny.tokens(CONFIG, n, seed=n).tolist() for n in (200, 37)]
STEPS = 64
BUDGET = Policy.budget(0.02, codec="int8_int4", sink_tokens=0, recent_tokens=0)
PAPER = Policy.paper(k_max=8)
EVERYTHING_DENSE = Policy.budget(1e-30, "absolute", sink_tokens=0, recent_tokens=0)
WAYS = {
    "dense": ("dense", BUDGET),
    "naive": ("naive", BUDGET),
    "paper": ("certified", PAPER),
    "budget": ("certified", BUDGET),
}
every_way = pytest.mark.parametrize(
    "way", [pytest.param(way, marks=pytest.mark.smoke if way in ("dense", "budget") else ()) for way in WAYS]
)
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|model|>"


@pytest.fixture(scope="module", autouse=True)
def traces():
    """Names of the programs' parts, one entry for each time that one was traced."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("prefill", "decode_step"):
            original = getattr(decode, name)

            def counted(*args, name=name, original=original, **options):
                seen.append(name)
                return original(*args, **options)

            patch.setattr(decode, name, counted)
        yield seen


@pytest.fixture(scope="module")
def endless():
    """A model that knows no end of sequence."""
    return Model(CONFIG, init_params(CONFIG, jax.random.key(5)), None, "tiny")


@pytest.fixture(scope="module")
def endless_tokens(endless):
    """Dense tokens of both prompts, 65 each."""
    return generate(endless, PROMPTS, max_new_tokens=STEPS + 1, mode="dense").tokens


@pytest.fixture(scope="module")
def model(endless, endless_tokens):
    """The same model; a token that the second prompt meets early and the first never is its end of sequence."""
    first, second = (row.tolist() for row in endless_tokens)
    end = next(t for i, t in enumerate(second) if 3 <= i <= 12 and second.index(t) == i and t not in first)
    return dataclasses.replace(endless, config=dataclasses.replace(CONFIG, eos_token_ids=(end,)))


@pytest.fixture(scope="module")
def tested(endless, model):
    """Model and prompts of a way. Where tokens may leave the dense ones a row could end anywhere: there it never does,
    and one prompt will do."""
    ragged, lone = (model, PROMPTS), (endless, PROMPTS[:1])
    return {"dense": ragged, "naive": lone, "paper": lone, "budget": ragged}


@pytest.fixture(scope="module")
def results(tested, traces):
    """`results(way)`: 65 tokens of its prompts in one batch, and the traces it took. Made once a way."""
    made = {}

    def of(way):
        if way not in made:
            mode, policy = WAYS[way]
            before = len(traces)
            generation = generate(*tested[way], max_new_tokens=STEPS + 1, mode=mode, policy=policy)
            made[way] = generation, traces[before:]
        return made[way]

    return of


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Byte-level, a token for every byte: random ids decode to text with many incomplete characters."""
    folder = tmp_path_factory.mktemp("tokenizer")
    backend = Backend(BPE(vocab={token: i for i, token in enumerate(SPECIAL + ALPHABET)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    backend.save(str(folder / "tokenizer.json"))
    plain = Tokenizer(folder)
    (folder / "tokenizer_config.json").write_text('{"chat_template": "' + TEMPLATE + '"}')
    return {"plain": plain, "chat": Tokenizer(folder)}


@pytest.fixture
def talking(model, tokenizer):
    """The model with a tokenizer that has no chat template."""
    return dataclasses.replace(model, tokenizer=tokenizer["plain"])


def assert_same_tokens(found, expected):
    assert [row.tolist() for row in found] == [row.tolist() for row in expected]


# -- one trace ----------------------------------------------------------------------------------------


@every_way
def test_64_decode_steps_take_one_trace(results, way):
    generation, traced = results(way)
    assert generation.telemetry.valid.shape[0] == STEPS
    assert traced in (["prefill", "decode_step"], ["decode_step"])  # the prefill is shared by the modes


@pytest.fixture(scope="module")
def longest(model, traces):
    """A generation that ends where the model's context does, and the traces it took."""
    before = len(traces)
    generation = generate(model, [1] * 600, max_new_tokens=11, mode="dense", policy=BUDGET)
    return generation, traces[before:]


def test_prompts_of_one_bucket_share_the_programs_and_those_of_another_do_not(model, traces, longest):
    assert longest[1] == ["prefill", "decode_step"]
    before = None
    for n in (5, 256, 77):
        generate(model, tiny.tokens(CONFIG, n).tolist(), max_new_tokens=11, mode="dense", policy=BUDGET)
        before = before or len(traces)
    assert len(traces) == before


def test_another_prompt_of_the_bucket_compiles_nothing_in_certified_mode(model, results, traces):
    results("budget")
    others = [tiny.tokens(CONFIG, n, seed=1).tolist() for n in (120, 9)]
    before, compiled = len(traces), []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        other = generate(model, others, max_new_tokens=STEPS + 1, policy=BUDGET)
        assert traces[before:] == [] and compiled == []
        jax.block_until_ready(jax.jit(lambda x: x + len(traces))(jnp.zeros(3)))
        assert compiled, "the listener hears a compilation where there is one"
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert other.prompt_lengths == [120, 9]


def test_decode_loop_is_one_while_loop_without_a_host_callback(model):
    tokens = jnp.asarray([PROMPTS[0] + [0] * 56], jnp.int32)  # the bucket of the prompts that are tested alone
    static = (model.config, "certified", BUDGET, Sampling())
    state = decode.start(*static, 512, 16, model.params, tokens, jnp.asarray([200], jnp.int32), jax.random.key(0))
    arguments = (*static, model.params, state, jnp.int32(1))
    traced = decode.run.program(*arguments).trace(*arguments)
    primitives = [equation.primitive.name for equation in traced.jaxpr.eqns]
    assert primitives.count("while") == 1 and "scan" not in primitives
    lowered = traced.lower().as_text()
    assert "stablehlo.while" in lowered and "callback" not in lowered
    assert "callback" in jax.jit(lambda x: jax.debug.print("{}", x)).lower(1.0).as_text()


# -- the same tokens ----------------------------------------------------------------------------------


@every_way
def test_same_arguments_give_the_same_tokens_and_certificates(tested, results, way):
    first, _ = results(way)
    mode, policy = WAYS[way]
    again = generate(*tested[way], max_new_tokens=STEPS + 1, mode=mode, policy=policy)
    assert_same_tokens(again.tokens, first.tokens)
    jax.tree.map(np.testing.assert_array_equal, again.telemetry, first.telemetry)


@pytest.mark.parametrize("way", WAYS)
def test_first_token_comes_from_the_dense_prefill_in_every_mode(results, endless_tokens, way):
    generation, _ = results(way)
    assert all(row[0] == dense[0] for row, dense in zip(generation.tokens, endless_tokens, strict=False))


def test_same_key_draws_the_same_tokens_and_another_key_others(model):
    def tokens(seed):
        key = jax.random.key(seed)
        options = dict(temperature=2.0, top_k=50, top_p=0.9)
        result = generate(model, PROMPTS[0], max_new_tokens=16, mode="dense", policy=BUDGET, key=key, **options)
        return result.tokens[0].tolist()

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)


@pytest.mark.parametrize("way", ["dense", "budget"])
def test_row_of_a_ragged_batch_gets_the_tokens_it_gets_alone(model, results, way):
    together, _ = results(way)
    mode, policy = WAYS[way]
    for row, prompt in enumerate(PROMPTS):
        alone = generate(model, prompt, max_new_tokens=16, mode=mode, policy=policy)
        assert_same_tokens(alone.tokens, [together.tokens[row][:16]])


def test_certified_with_every_head_dense_gives_the_dense_tokens(model, results):
    dense, _ = results("dense")
    for prompt, expected in zip(PROMPTS, dense.tokens, strict=True):
        certified = generate(model, prompt, max_new_tokens=16, policy=EVERYTHING_DENSE)
        assert (certified.telemetry.certificate.rung == 3).all()
        assert_same_tokens(certified.tokens, [expected[:16]])


def test_prompts_may_be_ids_arrays_text_or_a_mixture(talking):
    text = "hello"
    ids = talking.tokenizer.encode(text)

    def tokens(prompts):
        return generate(talking, prompts, max_new_tokens=4, mode="dense", policy=BUDGET).tokens

    expected = tokens(ids)
    for one in (text, [text], [ids], np.asarray(ids), tuple(ids), [np.asarray(ids)]):
        assert_same_tokens(tokens(one), expected)
    assert_same_tokens(tokens([text, ids]), expected * 2)


def test_chat_is_the_template_around_the_prompt(model, tokenizer):
    talker = dataclasses.replace(model, tokenizer=tokenizer["chat"])

    def tokens(prompt, **options):
        return generate(talker, prompt, max_new_tokens=4, mode="dense", policy=BUDGET, **options).tokens

    assert_same_tokens(tokens("hello", chat=True), tokens("<|user|>hello<|model|>"))
    assert tokens("hello", chat=True)[0].tolist() != tokens("hello")[0].tolist()


# -- streaming ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["dense", "budget"])
def test_streamed_pieces_add_up_to_the_generated_text_with_the_same_program(talking, traces, way):
    mode, policy = WAYS[way]
    whole = generate(talking, PROMPTS[0], max_new_tokens=16, mode=mode, policy=policy)
    before = len(traces)
    pieces = list(stream(talking, PROMPTS[0], max_new_tokens=16, mode=mode, policy=policy))
    assert traces[before:] == []
    assert len(pieces) > 3 and all(pieces)
    assert "".join(pieces).rstrip("\ufffd") == whole.text[0].rstrip("\ufffd")


def test_stream_ends_as_the_text_does_when_the_last_character_is_incomplete(talking):
    """Whatever number of tokens: some of these texts end within a character."""
    texts, streams = [], []
    for n in range(1, 17):
        options = dict(max_new_tokens=n, mode="dense", policy=BUDGET)
        texts.append(generate(talking, PROMPTS[0], **options).text[0])
        streams.append("".join(stream(talking, PROMPTS[0], **options)))
    assert any(text.endswith("\ufffd") for text in texts)
    assert streams == texts


def test_stream_stops_at_the_end_of_the_sequence(talking, results):
    tokens = results("dense")[0].tokens[1]
    pieces = list(stream(talking, PROMPTS[1], max_new_tokens=16, mode="dense", policy=BUDGET))
    assert "".join(pieces) == talking.tokenizer.decode(tokens)
    assert len(pieces) <= len(tokens) < 16


# -- where sequences end, and what is recorded ----------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("way", ["dense", "budget"])
def test_row_ends_with_its_end_of_sequence_while_the_other_goes_on(model, results, way):
    generation, _ = results(way)
    (end,) = model.config.eos_token_ids
    long, short = (row.tolist() for row in generation.tokens)
    assert len(long) == STEPS + 1 and end not in long
    assert short.index(end) == len(short) - 1 < STEPS
    # A row's first token comes from the prefill, so it takes one step less than it has tokens.
    steps = np.arange(STEPS)
    np.testing.assert_array_equal(generation.telemetry.valid[:, 0], steps < len(long) - 1)
    np.testing.assert_array_equal(generation.telemetry.valid[:, 1], steps < len(short) - 1)


def test_loop_ends_when_every_row_has_ended(model, results):
    expected = results("dense")[0].tokens[1]
    generation = generate(model, PROMPTS[1], max_new_tokens=16, mode="dense", policy=BUDGET)
    assert_same_tokens(generation.tokens, [expected])
    assert generation.telemetry.valid.shape == (len(expected) - 1, 1)
    assert generation.telemetry.valid.all()


def test_end_of_sequence_from_the_prefill_takes_no_step(endless, endless_tokens):
    end = int(endless_tokens[0][0])
    ended = dataclasses.replace(endless, config=dataclasses.replace(CONFIG, eos_token_ids=(1000, end)))
    generation = generate(ended, PROMPTS[0], max_new_tokens=16, mode="dense")
    assert [row.tolist() for row in generation.tokens] == [[end]]
    assert generation.telemetry.valid.shape == (0, 1)
    assert generation.report().decode_tokens_per_second == 0


@pytest.mark.parametrize("way", ["paper", pytest.param("budget", marks=pytest.mark.smoke)])
def test_every_head_of_every_step_and_layer_has_a_certificate(results, way):
    record = results(way)[0].telemetry.certificate
    shape = (STEPS, CONFIG.n_layers, {"paper": 1, "budget": 2}[way], CONFIG.n_heads)
    expected = empty_certificate(shape)
    for field in dataclasses.fields(Certificate):
        leaf = getattr(record, field.name)
        assert isinstance(leaf, np.ndarray) and leaf.shape == shape, field.name
        assert leaf.dtype == getattr(expected, field.name).dtype, field.name
    assert (record.out_norm > 0).all() and (record.e_total > 0).all() and np.isfinite(record.e_total).all()
    assert set(np.unique(record.rung)) <= {0, 1, 2, 3, 4}
    assert record.canary_ok.all() and record.precondition_ok.all()


def test_rows_that_never_end_are_valid_throughout(results):
    for way in ("naive", "paper"):
        generation, _ = results(way)
        assert [len(row) for row in generation.tokens] == [STEPS + 1]
        assert generation.telemetry.valid.all() and generation.telemetry.valid.shape == (STEPS, 1)


def test_only_certified_mode_has_certificates(results):
    for way in ("dense", "naive"):
        generation, _ = results(way)
        assert generation.telemetry.certificate is None and generation.report().certificate is None


@pytest.mark.smoke
def test_every_head_step_is_within_tolerance_or_dense_and_both_happen(results):
    telemetry = results("budget")[0].telemetry
    record = telemetry.certificate
    dense = record.rung >= 3
    valid = np.broadcast_to(telemetry.valid[:, None, :, None], dense.shape)
    assert ((record.e_total <= record.tolerance) | dense)[valid].all()
    assert dense[valid].any() and not dense[valid].all()
    assert (record.e_key[dense] == 0).all() and (record.e_val[dense] == 0).all()
    norm = np.sqrt((np.float64(record.out_norm) ** 2).mean(-1, keepdims=True))
    allowed = np.sqrt((np.float64(record.tolerance) ** 2).mean(-1, keepdims=True))
    np.testing.assert_allclose(allowed, BUDGET.tolerance * norm, rtol=1e-4)


@pytest.mark.smoke
def test_report_counts_the_valid_head_steps_only(results):
    generation, _ = results("budget")
    valid, record = generation.telemetry.valid, generation.telemetry.certificate
    report = generation.report()
    keep = np.broadcast_to(valid[:, None, :, None], record.rung.shape)
    assert keep.sum() < keep.size
    summary = report.certificate
    assert summary["head_steps"] == valid.sum() * CONFIG.n_layers * CONFIG.n_heads
    assert summary["dense_head"] == (record.rung[keep] == 3).sum()
    assert summary["dense_layer"] == 0 and summary["within_tolerance_or_dense"] == 1.0
    assert summary["bytes_paged_in_per_step"] == pytest.approx(record.bytes_paged_in[keep].sum() / STEPS)
    assert summary["e_total_over_layer_norm"]["p50"] <= summary["e_total_over_layer_norm"]["p100"]
    assert (report.prompt_tokens, report.new_tokens) == (237, sum(map(len, generation.tokens)))
    assert (report.mode, report.policy) == ("certified", dataclasses.asdict(BUDGET))
    assert report.cache_bytes.keys() == {"tier1", "windows", "tier2"} and report.cache_bytes["tier2"] > 0
    assert report.decode_tokens_per_second > 0 and report.first_token_seconds > 0
    assert f"{summary['head_steps']:,}" in str(report) and "certified / budget" in str(report)


def test_report_of_a_mode_without_certificates_says_what_the_cache_takes(results):
    dense, naive = (results(way)[0].report() for way in ("dense", "naive"))
    assert dense.cache_bytes.keys() == {"device"} and dense.host_memory_kind is None
    # Float32 originals of two prompts against 8 and 4 bits of one.
    assert naive.cache_bytes["tier2"] == 0 < naive.cache_bytes["tier1"] < dense.cache_bytes["device"] / 2
    assert "head-steps" not in str(dense) + str(naive)


@pytest.mark.parametrize("way", ["dense", "budget"])
def test_single_new_token_takes_no_decode_step_and_has_a_report(model, results, way):
    mode, policy = WAYS[way]
    generation = generate(model, PROMPTS[0], max_new_tokens=1, mode=mode, policy=policy)
    assert_same_tokens(generation.tokens, [results("dense")[0].tokens[0][:1]])
    assert generation.telemetry.valid.shape == (0, 1)
    report = generation.report()
    assert (report.new_tokens, report.certificate, report.decode_tokens_per_second) == (1, None, 0.0)
    assert "1 new" in str(report)


# -- what is refused ----------------------------------------------------------------------------------

IDS = [1, 2, 3]
REFUSED = {
    "unknown mode": (IDS, {"mode": "sparse"}, "unknown mode 'sparse'; choose one of dense, naive, certified"),
    "no new tokens": (IDS, {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
    "negative new tokens": (IDS, {"max_new_tokens": -3}, "max_new_tokens must be at least 1, got -3"),
    "no prompts": ([], {}, "prompts is empty"),
    "empty text": ("", {}, "prompt is empty"),
    "empty text in a batch": (["a", ""], {}, "prompt is empty"),
    "empty ids in a batch": ([IDS, []], {}, "prompt is empty"),
    "id beyond the vocabulary": ([0, CONFIG.vocab_size], {}, rf"token ids must be in \[0, {CONFIG.vocab_size}\)"),
    "negative id": ([-1], {}, rf"token ids must be in \[0, {CONFIG.vocab_size}\)"),
    "chat without a template": ("hello", {"chat": True}, "no chat template; pass chat=False"),
    "negative temperature": (IDS, {"temperature": -1.0}, "temperature must be >= 0"),
    "negative top_k": (IDS, {"top_k": -1}, "top_k must be >= 0"),
    "policy by name": (IDS, {"policy": "budget"}, "policy must be a certjax.Policy, got str; make one by Policy"),
    "policy not called": (IDS, {"policy": Policy.budget}, "policy must be a certjax.Policy, got a class or function"),
    "a half token": (IDS, {"max_new_tokens": 1.5}, "max_new_tokens must be an integer, got 1.5"),
    "a half top_k": (IDS, {"top_k": 1.7}, "top_k must be an integer"),
    "bytes": (b"hi", {}, "prompts is bytes; decode it"),
    "ids that are no integers": ([[1.0, 2.0]], {}, "a token id must be an integer, got 1.0"),
    "top_p of zero": (IDS, {"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
}
TOO_LONG = {
    "prompt beyond the context": ([1] * 612, {"max_new_tokens": 1}, "612 tokens.*max_new_tokens=1 .*context of 611"),
    "new tokens beyond the context": (
        [1] * 600,
        {"max_new_tokens": 12},
        "600 tokens.*max_new_tokens=12 .*context of 611",
    ),
    "one row beyond the context": ([IDS, [1] * 611], {"max_new_tokens": 1}, "611 tokens.*context of 611"),
}


@pytest.fixture
def no_work(monkeypatch):
    def start(*_):
        raise AssertionError("work was begun before the arguments were checked")

    monkeypatch.setattr(decode, "start", start)


@pytest.mark.smoke
@pytest.mark.parametrize(("prompts", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_argument_is_named_before_any_work(talking, no_work, prompts, options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        generate(talking, prompts, **options)


@pytest.mark.parametrize(("prompts", "options", "message"), TOO_LONG.values(), ids=TOO_LONG)
def test_what_does_not_fit_the_context_is_refused_with_its_numbers_before_any_work(
    model, no_work, prompts, options, message
):
    with pytest.raises(ContextLengthError, match=message):
        generate(model, prompts, **options)


def test_the_whole_context_may_be_used(longest):
    generation, _ = longest
    assert generation.prompt_lengths == [600] and len(generation.tokens[0]) == 11


def test_work_is_begun_where_the_arguments_are_good(model, no_work):
    with pytest.raises(AssertionError, match="work was begun"):
        generate(model, IDS)


def test_text_for_a_model_without_tokenizer_is_refused_before_any_work(model, no_work):
    with pytest.raises(InvalidArgumentError, match="no tokenizer; pass prompts as token ids"):
        generate(model, "hello")
    with pytest.raises(InvalidArgumentError, match="no tokenizer; use generate"):
        stream(model, IDS)


def test_what_is_no_model_and_options_that_are_none_are_named(talking, no_work):
    for work in (generate, stream):
        with pytest.raises(InvalidArgumentError, match="model must be a certjax.Model, got str; certjax.load"):
            work("smollm2", "hello")
    with pytest.raises(TypeError, match=r"stream\(\) got an unexpected keyword argument 'polcy'"):
        stream(talking, "hello", polcy=None)


def test_representations_are_short(results, model):
    generation, _ = results("dense")
    assert len(repr(generation)) < 300 and "2 sequences" in repr(generation)
    assert len(repr(model)) < 800


@pytest.mark.parametrize("batch", [[IDS], [IDS, IDS], ["hello"], ["hello", "hello"]], ids=str)
def test_stream_refuses_a_batch_when_called_and_not_at_the_first_piece(talking, no_work, batch):
    with pytest.raises(InvalidArgumentError, match="stream takes one prompt; use generate"):
        stream(talking, batch)

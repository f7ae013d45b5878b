"""Samples fill their context and no more, are what RULER's are, and answer their own question."""

import collections
import hashlib
import json
import re

import pytest

import certjax
from certjax.errors import InvalidArgumentError
from certjax.eval.tasks import ALIASES, DEFAULT, FROM_FILE, TASKS, cwe, fwe, make_task, qa, vt
from certjax.eval.tasks.base import Source
from certjax.eval.tasks.fitting import TEMPLATE_TOKENS
from certjax.eval.tasks.niah import N_NEEDLES
from certjax.eval.tasks.ruler_niah import VARIANTS
from certjax.eval.texts import corpus
from checkpoints_tools import EmbeddedModelError, smollm2_source

CONTEXTS = (1024, 2048, 6000)
SENTENCES = [
    f"{['On', 'At', 'By'][i % 3]} day {i} Mr. Brown {'walked ' * (i % 7 + 1)}to town{'.!?'[i % 3]}" for i in range(2000)
]
ESSAY = "\n".join(SENTENCES)


def count_words(text: str) -> int:
    return len(text.split())


SOURCE = Source(count_words, ESSAY)


@pytest.fixture(scope="module")
def question_files(tmp_path_factory):
    """Files in the formats of SQuAD 2.0 and HotpotQA, of documents with some fifty words each."""
    folder = tmp_path_factory.mktemp("questions")

    def document(i):
        return f"Document of {i}: " + " ".join(SENTENCES[5 * i : 5 * i + 5])

    articles = [
        {
            "paragraphs": [
                {
                    "context": document(i),
                    "qas": [
                        {"question": f"What of {i}?", "is_impossible": False, "answers": [{"text": f"of {i}"}] * 2},
                        {"question": f"Why {i}?", "is_impossible": True, "answers": []},
                    ],
                }
                for i in range(start, start + 10)
            ]
        }
        for start in range(0, 200, 10)
    ]
    squad, hotpotqa = folder / "squad.json", folder / "hotpotqa.json"
    squad.write_text(json.dumps({"version": "v2.0", "data": articles}))
    entries = [
        {
            "question": f"Which is {i}?",
            "answer": f"of {i}:",
            "context": [[f"Title {j}", [document(j)[:60], document(j)[60:]]] for j in range(i, i + 4)],
        }
        for i in range(190)
    ]
    hotpotqa.write_text(json.dumps(entries))
    return {"qa_1": squad, "qa_2": hotpotqa}


@pytest.fixture(params=[*TASKS, *FROM_FILE])
def task(request, question_files):
    return make_task(request.param, question_files.get(request.param))


# Every task


@pytest.mark.parametrize("context", CONTEXTS)
def test_sample_fits_its_context_and_fills_it(task, context):
    for index in range(3):
        sample = task.sample(index, context, 0, SOURCE)
        room = context - task.max_new_tokens - TEMPLATE_TOKENS
        used = count_words(sample.prompt) + count_words(sample.answer_prefix)
        assert 0.9 * room <= used <= room


def test_sample_depends_on_its_arguments_alone(task):
    first = task.sample(3, 2048, 1, SOURCE)
    task.sample(4, 6000, 1, SOURCE)
    assert task.sample(3, 2048, 1, Source(count_words, ESSAY)) == first


def test_samples_of_other_indexes_seeds_and_contexts_differ(task):
    where = [(i, 2048, 0) for i in range(12)] + [(0, 2048, 1), (0, 2000, 0)]
    prompts = [task.sample(*place, SOURCE).prompt for place in where]
    assert len(set(prompts)) == len(where)


def test_prompt_and_prefix_read_as_one_text(task):
    sample = task.sample(0, 2048, 0, SOURCE)
    assert sample.prompt == sample.prompt.strip() and "{" not in sample.prompt + sample.answer_prefix
    assert sample.answer_prefix.startswith(" ") and sample.answer_prefix == sample.answer_prefix.rstrip()
    assert sample.references and all(sample.references)
    assert task.metric in ("all", "part")


def test_context_too_small_is_refused_with_what_it_takes(task):
    with pytest.raises(InvalidArgumentError, match=rf"{task.name!r} does not fit .* 128 tokens: .* longer context"):
        task.sample(0, 128, 0, SOURCE)


def test_context_that_the_message_asks_for_is_enough(task):
    with pytest.raises(InvalidArgumentError) as refused:
        task.sample(0, 128, 0, SOURCE)
    needed = int(re.search(r"sample takes (\d+)", str(refused.value))[1])
    task.sample(0, needed + 60, 0, SOURCE)  # a sample of another context is drawn anew: words may be longer


def test_text_too_short_for_the_context_is_refused():
    with pytest.raises(InvalidArgumentError, match="pass a longer text"):
        make_task("niah").sample(0, 2048, 0, Source(count_words, " ".join(SENTENCES[:50])))


# Of tasks that draw no word, so that the list of words may change.
DIGESTS = {"niah_multikey_3": "cfea9f403cf0eaff", "vt": "684081d8c7d2d1ed", "fwe": "12f404109fd62689"}


@pytest.mark.parametrize("name", DIGESTS)
def test_samples_are_the_same_on_every_machine(name):
    samples = [make_task(name).sample(index, 2048, seed, SOURCE) for index in range(3) for seed in range(2)]
    assert hashlib.sha256(repr(samples).encode()).hexdigest()[:16] == DIGESTS[name]


# The registry


def test_rulers_thirteen_and_ours_are_there():
    ruler = {*VARIANTS, "vt", "cwe", "fwe", "qa_1", "qa_2"}
    assert len(ruler) == 13
    assert {*TASKS, *FROM_FILE} == ruler | {"niah", "niah_each"}
    assert len(DEFAULT) == 7 and set(DEFAULT) <= ruler


def test_task_is_called_what_it_is_made_by(task):
    assert make_task(task.name, getattr(task, "path", None)) == task


def test_aliases_are_the_protocols_names():
    assert {alias: make_task(alias).name for alias in ALIASES} == ALIASES


@pytest.mark.parametrize(
    "name, path, message",
    [
        ("niah_double", None, "unknown task 'niah_double'; choose from niah_single_1, .*qa_2.*niah_single,"),
        ("qa_1", None, r"'qa_1' takes its questions from a file: download dev-v2.0.json of SQuAD 2.0"),
        ("qa_2", None, r"'qa_2' takes its questions from a file: download hotpot_dev_distractor_v1.json of HotpotQA"),
        ("vt", "file.json", "'vt' takes no file"),
    ],
)
def test_task_that_cannot_be_made_says_why(name, path, message):
    with pytest.raises(InvalidArgumentError, match=message):
        make_task(name, path)


# RULER's needles

RULER_NEEDLE = re.compile(r"One of the special magic (numbers|uuids) for (\S+) is: (\S+)\.")


def hidden(prompt):
    found = collections.defaultdict(list)
    for _, key, value in RULER_NEEDLE.findall(prompt):
        found[key].append(value)
    return found


def asked(sample):
    query = re.search(r" for (.*) mentioned in the provided text (is|are)$", sample.answer_prefix)[1]
    return re.split(r", and |, ", query)


@pytest.mark.parametrize("name", VARIANTS)
def test_references_are_the_values_of_the_keys_asked_for(name):
    task = make_task(name)
    for index in range(5):
        sample = task.sample(index, 2048, 0, SOURCE)
        found = hidden(sample.prompt)
        assert sorted(sample.references) == sorted(value for key in asked(sample) for value in found[key])
        assert len(sample.references) == task.n_queries * task.n_values
        assert all(sample.prompt.count(value) == 1 for value in sample.references)
        assert ("What are all the" in sample.prompt) == (len(sample.references) > 1)
        if task.haystack == "needle":
            assert len(found) > 50
        else:
            assert len(found) == max(task.n_keys, task.n_queries)
        assert all(len(values) == task.n_values for values in found.values())


@pytest.mark.parametrize("name", VARIANTS)
def test_haystack_is_whole_where_the_needles_were_put_in(name):
    task = make_task(name)
    text = task.sample(0, 2048, 0, SOURCE).prompt.split("afterwards.\n")[1].split("\nWhat ")[0]
    rest = RULER_NEEDLE.sub("", text)
    if task.haystack == "essay":
        assert " ".join(rest.split()) in " ".join((ESSAY + "\n" + ESSAY).split())
    elif task.haystack == "noise":
        assert set(rest.split("\n")) - {""} == {
            "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
        }
    else:
        assert not rest.strip()


def test_needles_are_spread_over_all_depths():
    task = make_task("niah_single_2")
    depths = []
    for index in range(40):
        prompt = task.sample(index, 1024, 0, SOURCE).prompt
        depths.append(RULER_NEEDLE.search(prompt).start() / len(prompt))
    assert min(depths) < 0.25 and max(depths) > 0.75
    assert len({round(depth, 3) for depth in depths}) > 20


# Ten needles

TEN = re.compile(r"The special magic number for (\S+) is (\d{7})\.")


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", ["niah", "niah_each"])
def test_ten_needles_stand_at_their_depths(name, context):
    prompt = make_task(name).sample(1, context, 0, SOURCE).prompt
    text = prompt.split("afterwards.\n")[1].split("\nWhat ")[0]
    sentences = re.split(r"(?<=[.!?])(?<!Mr\.) ", text)
    needles = [i for i, sentence in enumerate(sentences) if TEN.fullmatch(sentence)]
    total = len(sentences) - N_NEEDLES
    assert [i - before for before, i in enumerate(needles)] == [total * i // N_NEEDLES for i in range(N_NEEDLES)]
    assert total > N_NEEDLES


def test_all_ten_are_asked_for_and_the_first_is_begun():
    sample = make_task("niah").sample(0, 2048, 0, SOURCE)
    values = dict(TEN.findall(sample.prompt))
    assert len(values) == N_NEEDLES == len(set(sample.references))
    question = sample.prompt.rsplit("\n", 1)[1]
    names = sorted(values, key=lambda key: re.search(rf"(?:for|and|,) {key}\b", question).start())
    assert [values[name] for name in names] == list(sample.references)
    assert f"for {names[0]} is" in sample.answer_prefix


def test_trial_of_ten_samples_shares_its_context_and_asks_for_each_depth():
    task = make_task("niah_each")
    trials = [[task.sample(10 * trial + i, 2048, 0, SOURCE) for i in range(N_NEEDLES)] for trial in range(2)]
    for trial in trials:
        contexts = {sample.prompt.rsplit("\n", 1)[0] for sample in trial}
        assert len(contexts) == 1
        needles = TEN.findall(contexts.pop())
        assert [sample.references for sample in trial] == [(value,) for _, value in needles]
        assert all(f"for {key} mentioned" in s.answer_prefix for s, (key, _) in zip(trial, needles, strict=True))
    assert trials[0][0].prompt != trials[1][0].prompt


# Variable tracking


def follow(text):
    """Variables of `text` by value; a variable must be assigned before it is handed on."""
    values = {}
    for name, value in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text):
        values[name] = values.get(value) if value.isalpha() else value
    return values


@pytest.mark.parametrize("task", [make_task("vt"), vt.VariableTracking("vt_3_chains", n_chains=3, n_hops=2)])
def test_following_the_assignments_gives_the_answer(task):
    for index in range(5):
        sample = task.sample(index, 2048, 0, SOURCE)
        example, question = re.split(r"\n\n(?=Memorize)", sample.prompt)
        shown = re.search(r"assigned the value (\d+), they are: (.*)$", example)
        assert {name for name, value in follow(example).items() if value == shown[1]} == set(shown[2].split())
        value = re.search(r"assigned the value (\d+) in the text above\.$", question)[1]
        assert value in sample.answer_prefix
        assert {name for name, v in follow(question).items() if v == value} == set(sample.references)
        assert len(sample.references) == task.n_hops + 1
        assert len(follow(question)) == task.n_chains * (task.n_hops + 1)


def test_example_is_at_most_500_tokens():
    example = make_task("vt").sample(0, 6000, 0, SOURCE).prompt.split("\n\nMemorize")[0]
    assert 0.95 * vt.EXAMPLE_TOKENS < count_words(example) - vt.VariableTracking().n_hops - 1 <= vt.EXAMPLE_TOKENS


# Word counts


def listed(text):
    return re.findall(r"\d+\. (.+?)(?= \d+\. |$)", text)


@pytest.mark.parametrize("context, often, seldom", [(2048, 6, 1), (4096, 30, 3), (8192, 30, 3)])
def test_ten_words_are_more_common_than_all_others(context, often, seldom):
    sample = make_task("cwe").sample(0, context, 0, SOURCE)
    lines = sample.prompt.split("\n")
    counts = collections.Counter(listed(lines[-2]))
    assert {word for word, n in counts.items() if n == often} == set(sample.references)
    assert set(counts.values()) == {often, seldom} and len(sample.references) == 10
    shown = collections.Counter(listed(lines[1]))
    answer = lines[2].split(cwe.ANSWER_PREFIX)[1]
    assert {word for word, _ in shown.most_common(10)} == set(listed(answer))
    assert set(shown.values()) == ({3, 1} if context < 4096 else {10, 3})


@pytest.mark.parametrize("context", [512, 2048, 8192])
def test_three_coded_words_are_the_most_frequent_after_the_noise(context):
    sample = make_task("fwe").sample(0, context, 0, SOURCE)
    text = sample.prompt.split("coded words. ")[1].split("\nQuestion")[0]
    ranked = collections.Counter(text.split()).most_common()
    assert ranked[0][0] == "..."
    assert tuple(word for word, _ in ranked[1:4]) == sample.references
    assert ranked[3][1] > ranked[4][1]
    total = sum(n for _, n in ranked)
    assert ranked[1][1] / total == pytest.approx(1 / 4 / fwe.ZETA_2, rel=0.15)  # the rarest words are cut off


# Questions


@pytest.mark.parametrize("name", FROM_FILE)
def test_question_stands_among_its_documents(name, question_files):
    task = make_task(name, question_files[name])
    seen = set()
    for index in range(20):
        sample = task.sample(index, 2048, 0, SOURCE)
        documents = re.split(r"\n\nDocument \d+:\n", "\n\n" + sample.prompt.split("documents.\n\n")[1])[1:]
        numbers = [int(n) for n in re.findall(r"(?m)^Document (\d+):$", sample.prompt)]
        assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) > 20
        question = re.search(r"Question: \w+ (?:of|is) (\d+)\?$", sample.prompt)[1]
        assert any(f"Document of {question}:" in document for document in documents)
        assert len(sample.references) == 1 and question in sample.references[0]
        seen.add(question)
    assert len(seen) == 20


def test_paragraphs_of_the_same_article_come_first(question_files):
    sample = make_task("qa_1", question_files["qa_1"]).sample(0, 900, 0, SOURCE)
    question = int(re.search(r"What of (\d+)\?$", sample.prompt)[1])
    numbers = {int(n) for n in re.findall(r"Document of (\d+):", sample.prompt)}
    assert {10 * (question // 10) + i for i in range(10)} <= numbers


def test_more_context_than_documents_holds_them_all(question_files):
    sample = make_task("qa_1", question_files["qa_1"]).sample(0, 60_000, 0, SOURCE)
    assert len(set(re.findall(r"Document of (\d+):", sample.prompt))) == 200


@pytest.mark.parametrize("content", ["", "[", "{}", '{"data": 3}', '[{"question": "Who?"}]', "[]", '{"data": []}'])
@pytest.mark.parametrize("name", FROM_FILE)
def test_file_of_another_format_is_refused(name, content, tmp_path):
    (tmp_path / "file.json").write_text(content)
    with pytest.raises(InvalidArgumentError, match=f"file.json .*pass {qa.FILES[make_task(name, '.').dataset]}"):
        make_task(name, tmp_path / "file.json").sample(0, 2048, 0, SOURCE)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(InvalidArgumentError, match="absent.json cannot be read"):
        make_task("qa_1", tmp_path / "absent.json").sample(0, 2048, 0, SOURCE)


# The real tokenizer, and lm-evaluation-harness


@pytest.fixture(scope="module")
def real_source():
    try:
        smollm2_source()
    except EmbeddedModelError as error:
        pytest.skip(str(error))
    tokenizer = certjax.load("smollm2", progress=False).tokenizer
    return Source(lambda text: len(tokenizer.encode(text)), "\n\n".join(corpus().values()))


@pytest.mark.real
@pytest.mark.parametrize("context", [1024, 8192])
@pytest.mark.parametrize("name", TASKS)
def test_samples_fit_in_tokens_of_a_real_tokenizer(real_source, name, context):
    task = make_task(name)
    room = context - task.max_new_tokens - TEMPLATE_TOKENS
    for index in range(2):
        sample = task.sample(index, context, 0, real_source)
        assert 0.9 * room <= real_source.count_tokens(sample.prompt + sample.answer_prefix) <= room
        assert all(reference in sample.prompt for reference in sample.references)


def test_prompts_are_those_of_the_installed_lm_eval():
    pytest.importorskip(
        "lm_eval", reason="compares with lm-evaluation-harness: pip install 'lm_eval[ruler]' transformers"
    )
    for ours, theirs in ((cwe, "cwe_utils"), (fwe, "fwe_utils"), (qa, "qa_utils")):
        module = pytest.importorskip(f"lm_eval.tasks.ruler.{theirs}", reason="needs lm_eval[ruler] and transformers")
        assert ours.PROMPT.replace("{question}", "{query}") == module.CONFIG["template"]
        assert ours.ANSWER_PREFIX.strip() == module.CONFIG["answer_prefix"].strip()

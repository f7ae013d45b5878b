"""Runs into a file: the same command gives the same records, a killed run goes on, and nothing is mixed up.

And `certjax eval`, the command, with a converted tiny model.
"""

import dataclasses
import json

import jax
import pytest
from click.testing import CliRunner

from certjax import ContextLengthError, InvalidArgumentError
from certjax.cli.eval import eval_command
from certjax.eval import engine, records, run
from certjax.eval.answers import Questions, prompt_of, source_of
from certjax.eval.modes import parse_modes
from certjax.eval.perplexity import windows
from certjax.eval.tasks.base import Sample
from checkpoints_tools import convert
from tests.checkpoints_tools.builders import hf_weights, tiny_config, write_hf
from tests.eval import tiny_model
from tests.eval.tiny_model import CONFIG, NAIVE, TEXT

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONTEXT = 64
MODES = parse_modes(["dense", NAIVE])


@dataclasses.dataclass(frozen=True)
class Copying:
    """A task of the tests': the references are bytes that any continuation has, and one that none has."""

    name: str = "copying"
    max_new_tokens: int = 8
    metric: str = "all"

    def sample(self, index, context, seed, source):
        return Sample(f"{source.text[index : index + 30 + 5 * index]} {seed}", " Answer:", ("", "never"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model.model(tiny_model.tokenizer(tmp_path_factory.mktemp("plain")))


@pytest.fixture(scope="module")
def works(model):
    losses = windows(model, {"book": TEXT}, [CONTEXT], 3)
    source = source_of(model.tokenizer, TEXT)
    asked = Questions("niah", Copying(), CONTEXT, range(3), 0, source, model.tokenizer, CONFIG.context_length, False)
    return [*losses, asked]


@pytest.fixture(scope="module")
def whole(model, works, tmp_path_factory):
    """Bytes of the file of a run that was not interrupted, in batches of two."""
    path = tmp_path_factory.mktemp("whole") / "run.jsonl"
    run.run(model, works, MODES, path, batch=2)
    return path.read_bytes()


def timeless(content):
    return [dataclasses.replace(records.Record.from_json(line), seconds=0.0) for line in content.splitlines()]


# -- what is run --------------------------------------------------------------------------------------


def test_every_sample_of_every_mode_has_one_record(whole, works):
    found = timeless(whole)
    assert len(found) == len({record.key for record in found}) == 12
    assert {(r.benchmark, r.task, r.mode, r.sample) for r in found} == {
        (w.benchmark, w.task, mode.label, i) for w in works for mode in MODES for i in w.samples
    }
    for record in found:
        assert record.versions.keys() == {"model", "certjax", "jax", "jaxlib", "wonderwords", "device"}
        assert record.versions["model"] == "tiny"
        assert (record.certificate is None) == (record.mode == "dense")
        if record.benchmark == "ppl":
            assert record.score is record.prediction is None and len(record.token_nll) == CONTEXT // 2
        else:
            assert record.token_nll is None and record.score == 0.5 and record.references == ["", "never"]
            assert record.new_tokens == 8 and record.prompt_tokens == 30 + 5 * record.sample + 2 + len(" Answer:")
    naive = {r.sample: r for r in found if r.benchmark == "ppl" and r.mode == NAIVE}
    dense = {r.sample: r for r in found if r.benchmark == "ppl" and r.mode == "dense"}
    assert all(naive[i].token_nll != dense[i].token_nll for i in dense)


def test_same_command_gives_the_same_records(model, works, whole, tmp_path):
    jax.clear_caches()
    run.run(model, works, MODES, tmp_path / "again.jsonl", batch=2)
    assert timeless((tmp_path / "again.jsonl").read_bytes()) == timeless(whole)


def test_batch_changes_nothing_but_rounding(model, works, whole, tmp_path):
    losses = {(r.mode, r.sample): r for r in timeless(whole) if r.benchmark == "ppl"}
    for record in run.run(model, works[:1], MODES[1:], tmp_path / "alone.jsonl"):
        assert record.token_nll == pytest.approx(losses[record.mode, record.sample].token_nll, rel=1e-4)


def test_texts_share_batches_and_prefills(model, tmp_path, monkeypatch):
    """Five windows of three texts, in batches of three: two prefills, and each window's losses as when it is alone."""
    works = windows(model, {"a": TEXT[:128], "b": TEXT[128:], "c": TEXT[::-1]}, [CONTEXT], 2)
    assert [len(work.samples) for work in works] == [2, 2, 2]
    works[1] = dataclasses.replace(works[1], samples=[1])
    prefill, sizes = engine.prefill, []

    def counted(model, prompts, capacity):
        sizes.append(len(prompts))
        return prefill(model, prompts, capacity)

    monkeypatch.setattr(engine, "prefill", counted)
    found = run.run(model, works, MODES, tmp_path / "run.jsonl", batch=3)
    assert sizes == [3, 3] and len({record.key for record in found}) == len(found) == 10
    for work in works:
        for record in run.run(model, [work], MODES, tmp_path / f"{work.task}.jsonl"):
            (same,) = [r for r in found if r.key == record.key]
            assert same.token_nll == pytest.approx(record.token_nll, rel=1e-4)
    before = (tmp_path / "run.jsonl").read_bytes()
    (tmp_path / "run.jsonl").write_bytes(before[: len(before) // 2])
    run.run(model, works, MODES, tmp_path / "run.jsonl", batch=3)
    assert timeless((tmp_path / "run.jsonl").read_bytes()) == timeless(before)


def test_works_of_other_contexts_tasks_or_halves_do_not_share_batches(model, works):
    texts = {"a": TEXT, "b": TEXT[::-1]}
    kin = {work.kin for work in windows(model, texts, [32, 64], 1) + windows(model, texts, [64], 1, scored=8)}
    assert len(kin) == 3
    other = dataclasses.replace(works[1], maker=Copying(name="other"))
    assert len({works[1].kin, other.kin, dataclasses.replace(works[1], context=128).kin, works[0].kin}) == 4


# -- going on -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.55, 0.9])
def test_killed_run_goes_on_and_ends_as_if_it_had_not_been(model, works, whole, tmp_path, kept):
    """Wherever it is cut: within a line, within a batch."""
    path = tmp_path / "run.jsonl"
    path.write_bytes(whole[: int(kept * len(whole))])
    found = run.run(model, works, MODES, path, batch=2)
    assert timeless(path.read_bytes()) == timeless(whole)
    assert [dataclasses.replace(r, seconds=0.0) for r in found] == timeless(whole)


def test_finished_run_does_no_work(model, works, whole, tmp_path, monkeypatch):
    monkeypatch.setattr("certjax.eval.engine.prefill", None)
    (tmp_path / "run.jsonl").write_bytes(whole)
    assert len(run.run(model, works, MODES, tmp_path / "run.jsonl", batch=2)) == 12
    assert (tmp_path / "run.jsonl").read_bytes() == whole


def test_another_mode_is_added_to_what_is_there(model, works, whole, tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_bytes(b"".join(line for line in whole.splitlines(keepends=True) if b'"mode": "dense"' in line))
    run.run(model, works, MODES[1:], path, batch=2)
    assert sorted(timeless(path.read_bytes()), key=str) == sorted(timeless(whole), key=str)


def no_work(monkeypatch):
    def refuse(*args):
        raise AssertionError("work was done")

    monkeypatch.setattr("certjax.eval.engine.prefill", refuse)


def test_records_of_another_configuration_are_an_error_before_any_work(model, works, whole, tmp_path, monkeypatch):
    no_work(monkeypatch)
    path = tmp_path / "run.jsonl"
    cut = whole[:-5]
    path.write_bytes(cut)
    other = dataclasses.replace(model, params=jax.tree.map(lambda x: x * 1.01, model.params))
    renamed = [dataclasses.replace(MODES[1], label="dense")]  # another policy under a name that is taken
    for changed, modes in ((other, MODES), (model, renamed)):
        with pytest.raises(InvalidArgumentError, match="give another --out"):
            run.run(changed, works, modes, path)
    longer = dataclasses.replace(works[1], maker=Copying(max_new_tokens=9))
    with pytest.raises(InvalidArgumentError, match="niah copying at 64 tokens in mode 'dense'"):
        run.run(model, [longer], MODES, path)
    assert path.read_bytes() == cut


def test_name_and_place_of_a_model_are_no_part_of_its_fingerprint(model):
    assert run.fingerprint(dataclasses.replace(model, name="elsewhere")) == run.fingerprint(model)
    swapped = jax.tree.map(lambda x: x[::-1], model.params)
    assert run.fingerprint(dataclasses.replace(model, params=swapped)) != run.fingerprint(model)


def test_what_cannot_be_run_is_refused_before_any_work(model, works, tmp_path, monkeypatch):
    no_work(monkeypatch)
    with pytest.raises(InvalidArgumentError, match="no directory"):
        run.run(model, works, MODES, tmp_path / "nowhere" / "run.jsonl")
    with pytest.raises(InvalidArgumentError, match="no file"):
        run.run(model, works, MODES, tmp_path)
    (tmp_path / "text.jsonl").write_text("text\n")
    with pytest.raises(InvalidArgumentError, match=r"text\.jsonl:1 is no record"):
        run.run(model, works, MODES, tmp_path / "text.jsonl")
    with pytest.raises(ContextLengthError, match="exceeds the 256"):
        run.run(model, windows(model, {"book": TEXT}, [512], 1), MODES, tmp_path / "run.jsonl")
    with pytest.raises(InvalidArgumentError, match="does not fit model tiny"):
        run.run(model, works, parse_modes(["paper:group_size=5"]), tmp_path / "run.jsonl")
    with pytest.raises(InvalidArgumentError, match="batch must be at least 1"):
        run.run(model, works, MODES, tmp_path / "run.jsonl", batch=0)
    too_long = dataclasses.replace(works[1], maker=Copying(max_new_tokens=250))
    with pytest.raises(ContextLengthError, match="sample 0 of task copying has"):
        run.run(model, [too_long], MODES, tmp_path / "run.jsonl")
    assert not (tmp_path / "run.jsonl").exists()


def test_chat_prompt_begins_the_answer_for_the_model(model, tmp_path):
    chat = tiny_model.tokenizer(tmp_path, chat=True)
    sample = Sample("Question?", " Answer:", ("x",))
    assert prompt_of(sample, None) == "Question? Answer:"
    assert prompt_of(sample, chat) == "<|user|>Question?<|model|>Answer:"
    assert source_of(tiny_model.tokenizer(tmp_path, bos=True), "").count_tokens("abc") == 3


# -- the command --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    weights = {name: w if w.ndim == 1 else w * 0.1 for name, w in hf_weights(tiny_config()).items()}
    (folder / "book.txt").write_text(TEXT)
    return convert(write_hf(folder / "hf", tiny_config(), weights), folder / "tiny", progress=False)


@pytest.fixture(autouse=True)
def no_compilation_cache_of_the_command(monkeypatch):
    monkeypatch.setattr("certjax.cli.eval.use_compilation_cache", lambda: None)


def command(benchmark, checkpoint, out, *options):
    text = checkpoint.parent / "book.txt"
    arguments = [benchmark, "--model", checkpoint, "--text", text, "--out", out, "--contexts", CONTEXT, *options]
    return CliRunner().invoke(eval_command, [str(a) for a in arguments])


def test_command_writes_records_prints_a_table_and_goes_on(checkpoint, tmp_path):
    out = tmp_path / "run.jsonl"
    result = command("ppl", checkpoint, out, "--windows", 2, "--modes", "dense", "--mode", NAIVE)
    assert result.exit_code == 0, result.output
    assert len(list(records.read(out))) == 4
    for part in ("book", "dense", "ppl", "4 records", f"certjax report {out} --out"):
        assert part in result.stdout
    before = out.read_bytes()
    result = command("ppl", checkpoint, out, "--windows", 2, "--mode", NAIVE, "--json")
    (row,) = json.loads(result.stdout)["rows"]
    assert (row["task"], row["mode"], row["samples"]) == ("book", NAIVE, 2)
    assert row["perplexity"] > 1 and row["bound_max"] > 0 and row["dense"] == 0
    assert out.read_bytes() == before


def test_command_scores_as_many_tokens_as_it_is_told_and_keeps_tier_2_where_it_is_told(checkpoint, tmp_path):
    out, mode = tmp_path / "run.jsonl", f"{NAIVE},tier2=device"
    result = command("ppl", checkpoint, out, "--windows", 2, "--scored", 8, "--mode", mode)
    assert result.exit_code == 0, result.output
    assert [(r.mode, r.new_tokens, r.prompt_tokens) for r in records.read(out)] == [(mode, 8, CONTEXT - 8)] * 2


BAD = {
    "unknown mode": ("ppl", ["--modes", "dense,sparse"], "unknown name 'sparse'"),
    "bad field": ("ppl", ["--mode", "budget:tol=1"], "unknown field 'tol'"),
    "mode twice": ("ppl", ["--modes", "dense", "--mode", "dense"], "given twice"),
    "contexts": ("ppl", ["--contexts", "2k"], "not a list of positive whole numbers"),
    "context too long": ("ppl", ["--contexts", "4096"], "4096"),
    "tier 2": ("ppl", ["--mode", "naive:tier2=disk"], "tier2 must be one of host, device, got 'disk'"),
    "scored": ("ppl", ["--scored", "63"], "63 tokens of a window of 64 cannot be scored"),
    "unknown title": ("ppl", ["--tasks", "emma"], "no text 'emma'"),
    "unknown task": ("ruler", ["--tasks", "vt,xyz"], "unknown task 'xyz'"),
    "task of another benchmark": ("niah", ["--tasks", "vt"], "vt is not of `certjax eval niah`"),
    "questions": ("ruler", ["--questions", "qa_1=nowhere.json"], "a file that exists"),
    "no template": ("ruler", ["--tasks", "vt", "--chat"], "no chat template"),
    "context too short": ("ruler", ["--tasks", "vt"], "does not fit into a context of 64"),
    "no directory": ("ppl", ["--out", "nowhere/run.jsonl"], "no directory nowhere"),
}


@pytest.mark.parametrize(("benchmark", "options", "part"), BAD.values(), ids=BAD)
def test_bad_option_is_a_message_and_a_status(checkpoint, tmp_path, benchmark, options, part):
    result = command(benchmark, checkpoint, tmp_path / "run.jsonl", *options)
    assert result.exit_code != 0 and isinstance(result.exception, SystemExit), result.output
    assert result.stdout == "" and "Traceback" not in result.stderr
    (line,) = [x for x in result.stderr.splitlines() if x.startswith("Error: ")]
    assert part in line
    assert not (tmp_path / "run.jsonl").exists()

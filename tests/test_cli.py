"""The `certjax` command: what it prints, its JSON, and errors as a message and a status."""

import json

import jax
import numpy as np
import pytest
from click.testing import CliRunner
from jax.experimental.compilation_cache import compilation_cache

from certjax import Policy, generate, load
from certjax.cli import main
from certjax.cli.common import use_compilation_cache
from checkpoints_tools import convert
from tests.checkpoints_tools.builders import hf_weights, tiny_config, write_gguf, write_hf

TEMPLATE = "{% for m in messages %}{{ m.content }}xyz{% endfor %}"
WAYS = [("dense", "budget"), ("naive", "paper"), ("certified", "budget"), ("certified", "paper")]
PROMPT = "hello 12 " * 8


@pytest.fixture(scope="module", autouse=True)
def isolated(tmp_path_factory, quick_compilation):
    """A cache directory of this module's own; programs compiled with little optimization, and kept where the suite
    keeps them."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        patch.setenv("HOME", str(cache / "home"))
        patch.setattr("certjax.cli.generate.use_compilation_cache", lambda: None)
        yield cache


@pytest.fixture
def compilation_cache_of_the_command(monkeypatch):
    """What the module's fixture turned off, and JAX's settings as they were afterwards."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setattr("certjax.cli.generate.use_compilation_cache", use_compilation_cache)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny Hugging Face directory whose values are scaled to those of a trained model."""
    weights = {name: w if w.ndim == 1 else w * 0.1 for name, w in hf_weights(tiny_config()).items()}
    return write_hf(tmp_path_factory.mktemp("source") / "hf", tiny_config(), weights)


@pytest.fixture(scope="module")
def checkpoint(source, tmp_path_factory):
    return convert(source, tmp_path_factory.mktemp("converted") / "tiny", progress=False)


def run(*arguments, **options):
    return CliRunner().invoke(main, [str(a) for a in arguments], **options)


def generated(checkpoint, *arguments, prompt=PROMPT, **options):
    result = run("generate", "--model", checkpoint, "--prompt", prompt, "--max-new-tokens", 8, *arguments, **options)
    assert result.exit_code == 0, result.output
    return result


def strict_json(text: str):
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def assert_message(result, *parts):
    """A status, an empty stdout, and one `Error:` line without a traceback that says all of `parts`."""
    assert result.exit_code != 0 and isinstance(result.exception, SystemExit), result.output
    assert result.stdout == "" and "Traceback" not in result.stderr
    (line,) = [x for x in result.stderr.splitlines() if x.startswith("Error: ")]
    for part in parts:
        assert part in line


# -- generate -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "policy"), WAYS)
def test_json_holds_text_tokens_and_report_in_every_mode_and_with_every_policy(checkpoint, mode, policy):
    options = () if mode == "dense" else ("--policy", policy)
    result = generated(checkpoint, "--mode", mode, *options, "--json")
    payload = strict_json(result.stdout)
    assert payload.keys() == {"text", "tokens", "device", "report"}
    assert len(payload["text"]) == len(payload["tokens"]) == 1
    assert 1 <= len(payload["tokens"][0]) <= 8
    report = payload["report"]
    assert (report["mode"], report["policy"]["kind"]) == (mode, policy)
    assert report["new_tokens"] == len(payload["tokens"][0])
    if mode != "certified":
        assert report["certificate"] is None
        return
    certificate = report["certificate"]
    assert certificate["within_tolerance_or_dense"] == 1.0
    # One step less than tokens, 2 layers, 4 heads.
    assert certificate["head_steps"] == (len(payload["tokens"][0]) - 1) * 2 * 4
    assert certificate.keys() >= {
        "promoted", "dense_head", "dense_layer", "e_total_over_layer_norm", "e_total_candidate_over_layer_norm",
        "key_blocks_promoted_mean", "value_blocks_promoted_mean", "bytes_paged_in_per_step", "checks_failed",
    }  # fmt: skip
    assert certificate["checks_failed"].keys() == {"ranking", "boundary", "canary", "precondition"}


def test_table_follows_the_text(checkpoint):
    text = strict_json(generated(checkpoint, "--json").stdout)["text"][0]
    out = generated(checkpoint).stdout
    assert out.startswith(text + "\n")
    table = out[len(text) :]
    for label in ("mode", "certified / budget", "tokens/s", "KV bytes, tier1", "head-steps", "in tolerance or dense"):
        assert label in table
    assert "head-steps" not in generated(checkpoint, "--mode", "dense").stdout


def test_command_gives_what_the_library_gives(checkpoint):
    model = load(checkpoint)
    expected = generate(model, PROMPT, max_new_tokens=8, mode="dense", policy=Policy.budget())
    payload = strict_json(generated(checkpoint, "--mode", "dense", "--json").stdout)
    assert payload["tokens"] == [row.tolist() for row in expected.tokens]
    assert payload["text"] == expected.text


def test_options_reach_the_policy(checkpoint):
    options = ("--tolerance", 0.2, "--relative-to", "head", "--block-size", 32, "--kv-dtype", "bfloat16")
    result = generated(checkpoint, "--mode", "naive", *options, "--json")
    policy = strict_json(result.stdout)["report"]["policy"]
    assert (policy["tolerance"], policy["relative_to"], policy["codec"]) == (0.2, "head", "planes")
    assert policy["block_size"] == 32


def test_seed_decides_what_is_drawn(checkpoint):
    def tokens(seed):
        options = ("--mode", "dense", "--temperature", 5, "--top-k", 100, "--top-p", 0.95, "--json")
        return strict_json(generated(checkpoint, *options, "--seed", seed).stdout)["tokens"]

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)


def test_prompts_repeat_for_a_batch_and_dash_reads_stdin(checkpoint):
    options = ("--mode", "dense", "--json")
    alone = strict_json(generated(checkpoint, *options).stdout)
    piped = strict_json(generated(checkpoint, *options, prompt="-", input=PROMPT).stdout)
    assert piped["tokens"] == alone["tokens"]
    batch = strict_json(generated(checkpoint, *options, "--prompt", "xyz").stdout)
    assert len(batch["text"]) == 2 and batch["tokens"][0] == alone["tokens"][0]


def test_chat_template_is_used_where_there_is_one_unless_told_not_to(checkpoint, source, tmp_path):
    with_template = write_hf(tmp_path / "hf", tiny_config(), {})
    (with_template / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    settings = json.loads((with_template / "tokenizer_config.json").read_text())
    (with_template / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    chatty = convert(with_template, tmp_path / "out", progress=False)

    def prompt_tokens(directory, *options):
        result = generated(directory, "--mode", "dense", "--json", *options, prompt="xyz")
        return strict_json(result.stdout)["report"]["prompt_tokens"]

    assert prompt_tokens(checkpoint) == 3
    assert prompt_tokens(chatty) == prompt_tokens(chatty, "--chat") == 6
    assert prompt_tokens(chatty, "--no-chat") == 3
    result = run("generate", "--model", checkpoint, "--prompt", "xyz", "--chat")
    assert_message(result, "no chat template")


def test_compiled_programs_are_kept_in_the_cache_directory(checkpoint, isolated, compilation_cache_of_the_command):
    jax.config.update("jax_compilation_cache_dir", None)
    generated(checkpoint, "--mode", "dense")
    assert jax.config.jax_compilation_cache_dir == str(isolated / "certjax" / "compiled")
    # Were it anywhere else: nothing was written to the home directory.
    assert not (isolated / "home").exists()


# -- what is refused ----------------------------------------------------------------------------------

BAD_OPTIONS = {
    "tolerance with the paper policy": (["--policy", "paper", "--tolerance", "0.1"], "--tolerance"),
    "relative-to with the paper policy": (["--policy", "paper", "--relative-to", "head"], "--relative-to"),
    "tolerance of dense mode": (["--mode", "dense", "--tolerance", "0.1"], "--mode dense compresses and certifies"),
    "policy of dense mode": (["--mode", "dense", "--policy", "budget"], "--mode dense compresses and certifies"),
    "tolerance of zero": (["--tolerance", "0"], "tolerance must be positive, got 0"),
    "no new tokens": (["--max-new-tokens", "0"], "max_new_tokens must be at least 1"),
    "more tokens than the context": (["--max-new-tokens", "128"], "the model's context of 128"),
    "negative temperature": (["--temperature", "-1"], "temperature must be >= 0"),
    "empty prompt in the batch": (["--prompt", ""], "prompt is empty"),
    "unknown mode": (["--mode", "sparse"], "--mode"),
    "unknown codec": (["--codec", "fp4"], "--codec"),
}


@pytest.mark.parametrize(("options", "part"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
@pytest.mark.parametrize("json_flag", [[], ["--json"]], ids=["text", "json"])
def test_bad_option_is_a_message_and_a_status(checkpoint, options, part, json_flag):
    assert_message(run("generate", "--model", checkpoint, "--prompt", "xyz", *options, *json_flag), part)


def test_prompt_is_required(checkpoint):
    assert_message(run("generate", "--model", checkpoint), "--prompt")


def test_unknown_model_is_named_with_those_that_exist(tmp_path):
    result = run("generate", "--model", "gpt-17", "--prompt", "xyz")
    assert_message(result, "no model 'gpt-17'", "smollm2")
    result = run("generate", "--model", tmp_path, "--prompt", "xyz")
    assert_message(result, str(tmp_path), "not a converted checkpoint", "certjax convert")


@pytest.fixture
def damaged(source, tmp_path):
    """A converted checkpoint of its own for a test to damage."""
    return convert(source, tmp_path / "damaged", progress=False)


@pytest.mark.parametrize("file", ["manifest.json", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_truncated_file_of_a_checkpoint_is_named(damaged, file):
    path = damaged / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert_message(run("generate", "--model", damaged, "--prompt", "xyz", "--mode", "dense"), file)


def test_truncated_arrays_of_a_checkpoint_are_reported(damaged):
    largest = max((f for f in (damaged / "params").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    assert_message(run("generate", "--model", damaged, "--prompt", "xyz", "--mode", "dense"), str(damaged))


# -- convert ------------------------------------------------------------------------------------------


def test_convert_writes_what_generate_reads_and_says_so(source, tmp_path):
    out = tmp_path / "out"
    result = run("convert", source, out)
    assert result.exit_code == 0, result.output
    n = len(json.loads((out / "manifest.json").read_text())["leaves"])
    assert f"wrote {out}: {n} arrays, float32" in result.stdout
    np.testing.assert_array_equal(load(out).params["embed"]["embedding"].shape, (288, 64))


def test_convert_of_a_gguf_file_prints_the_manifest_as_json(tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf", tiny_config(), hf_weights(tiny_config()))
    result = run("convert", file, tmp_path / "out", "--dtype", "bfloat16", "--json")
    assert result.exit_code == 0, result.output
    payload = strict_json(result.stdout)
    assert payload["output"] == str(tmp_path / "out")
    assert payload["manifest"] == json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert {str(x.dtype) for x in jax.tree.leaves(load(tmp_path / "out").params)} == {"bfloat16"}


def test_convert_keeps_an_existing_output_unless_overwrite(source, tmp_path):
    (tmp_path / "out").mkdir()
    precious = tmp_path / "out" / "manifest.json"
    precious.write_text("precious")
    assert_message(run("convert", source, tmp_path / "out"), str(tmp_path / "out"), "Pass --overwrite to replace it")
    assert precious.read_text() == "precious"


def test_convert_deletes_nothing_that_it_did_not_write(source, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    result = run("convert", source, tmp_path, "--overwrite")
    assert_message(result, str(tmp_path), "not written by convert", "--overwrite does not delete it")
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_convert_overwrites_when_told_to(damaged, source):
    (damaged / "manifest.json").write_text("{}")
    assert_message(run("convert", source, damaged), "overwrite")
    assert run("convert", source, damaged, "--overwrite").exit_code == 0
    assert load(damaged).config.vocab_size == 288


def test_convert_of_a_source_that_is_not_there_is_a_message(tmp_path):
    assert_message(run("convert", tmp_path / "nowhere", tmp_path / "out"), "nowhere")
    assert not (tmp_path / "out").exists()


# -- help ---------------------------------------------------------------------------------------------


def commands(group=main, prefix=()):
    """Every command by its words, those of groups included."""
    for name, command in group.commands.items():
        words = (*prefix, name)
        yield from commands(command, words) if hasattr(command, "commands") else [words]


@pytest.mark.smoke
@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_help_of_every_command_lists_json(words):
    for flag in ("--help", "-h"):
        result = run(*words, flag)
        assert result.exit_code == 0
        assert "--json" in result.stdout and " ".join(words) in result.stdout


@pytest.mark.smoke
def test_help_lists_the_commands_and_version_is_that_of_the_package():
    import certjax

    assert all(command in run("--help").stdout for command in ("generate", "convert"))
    assert certjax.__version__ in run("--version").stdout

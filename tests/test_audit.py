"""The audit of a format: its numbers, its report, the `certjax audit` command and the heat map."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from matplotlib.image import imread

from certjax import Policy, TieredKVCache, load
from certjax.audit import audit, exact
from certjax.capture import Captured
from certjax.cli import main
from certjax.cli.audit import conclusion, percent
from certjax.errors import InvalidArgumentError
from certjax.ladder import _stored_bytes_of_a_block
from checkpoints_tools import convert
from tests.checkpoints_tools.builders import hf_weights, tiny_config, write_hf
from tests.test_cli import assert_message, strict_json

N = 512
TOKENS = np.random.default_rng(0).integers(288, size=N)
LAYERS, HEADS, KV_HEADS, D = 2, 4, 2, 16  # of `tiny_config`
SHAPE = (3, LAYERS, HEADS)
TEXT = "hello 12 " * 200  # some 1,000 tokens
NO_WINDOWS = {"sink_tokens": 0, "recent_tokens": 0}
POLICIES = {
    "planes": Policy.budget(10.0, codec="planes", refine=False, **NO_WINDOWS),  # nothing exceeds the tolerance
    "kivi_int2": Policy.budget(0.001, codec="kivi_int2", group_size=16),  # everything does
}


@pytest.fixture(scope="module", autouse=True)
def isolated(tmp_path_factory, quick_compilation):
    """A cache directory of this module's own, and the suite's compilation cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("certjax.cli.audit.use_compilation_cache", lambda: None)
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("source")

    def write(name, **changes):
        config = tiny_config(**changes)
        weights = {key: w if w.ndim == 1 else w * 0.1 for key, w in hf_weights(config).items()}
        return convert(write_hf(directory / name, config, weights), directory / f"{name}-converted", progress=False)

    return write


@pytest.fixture(scope="module")
def checkpoint(source):
    return source("tiny", max_position_embeddings=768)


@pytest.fixture(scope="module")
def model(checkpoint):
    """The command's model, so that its programs are compiled once."""
    return load(checkpoint)


@pytest.fixture(scope="module")
def reports(model):
    return {name: audit(model, TOKENS, policy, n_queries=3) for name, policy in POLICIES.items()}


# -- the numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
def test_every_error_is_within_its_bound(reports, name):
    report = reports[name]
    assert report.violations == report.broken == report.checks_failed == 0
    assert report.true.shape == report.certified.shape == report.promoted.shape == report.dense.shape == SHAPE
    assert np.isfinite(report.certified).all() and (report.true <= report.certified).all() and (report.true > 0).all()
    assert report.positions == (340, 425, 511) and report.n_tokens == N
    for key, array in report.heads.items():
        of, how = key.split("_")
        np.testing.assert_array_equal(array, getattr(np, how)(getattr(report, of), axis=0))
        assert array.shape == SHAPE[1:]


def test_two_bits_lose_more_than_planes(reports):
    two_bits, planes = reports["kivi_int2"], reports["planes"]
    assert two_bits.token_bytes < planes.token_bytes
    assert (two_bits.heads["true_median"] > planes.heads["true_median"]).all()
    assert two_bits.summary()["true_max"] > 5 * planes.summary()["true_max"]


def test_nothing_falls_back_within_the_tolerance(reports):
    total = reports["planes"].summary()
    assert total["promoted_blocks_mean"] == total["dense_share"] == total["bytes_paged_in_over_dense"] == 0
    assert total["true_above_tolerance"] == total["certified_above_tolerance"] == 0
    assert reports["planes"].worst_heads() == reports["planes"].worst_heads("certified") == []


def test_everything_falls_back_beyond_it(reports):
    report = reports["kivi_int2"]
    total = report.summary()
    assert total["dense_share"] == 1 and report.dense.all()
    assert total["true_above_tolerance"] == total["certified_above_tolerance"] == total["head_steps"] == 24
    # The whole capacity, once a KV head and layer, whatever the position.
    assert (report.bytes_paged_in == KV_HEADS * N * report.token_bytes_original).all()
    assert total["bytes_paged_in_per_step"] == report.bytes_paged_in[0].sum()
    expected = N / (np.array(report.positions) + 1)
    np.testing.assert_allclose(report.bytes_paged_in / report.bytes_dense, np.tile(expected[:, None], SHAPE[1]))


def test_bytes_of_a_token_are_those_of_its_block(reports):
    for name, policy in POLICIES.items():
        zeros = jnp.zeros((1, KV_HEADS, N, D), jnp.float16)
        cache = jax.eval_shape(lambda x, policy=policy: TieredKVCache.from_prefill(x, x, policy, capacity=N), zeros)
        assert reports[name].token_bytes == _stored_bytes_of_a_block(cache) / policy.block_size
        assert reports[name].token_bytes_original == 2 * D * 2


def test_bytes_read_without_windows_are_nearly_those_of_the_tokens(reports):
    report = reports["planes"]
    stored = report.token_bytes / report.token_bytes_original
    assert report.summary()["bytes_stored_over_dense"] == pytest.approx(stored, rel=0.15)


def test_reference_is_plain_softmax_attention():
    rng = np.random.default_rng(0)
    shapes = (2, 2, 4, 8), (2, 1, 2, 9, 8), (2, 1, 2, 9, 8)
    q, k, v = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    out = exact(Captured(q=q, keys=k, values=v), [4, 8])
    for i, p in enumerate([4, 8]):
        for layer, head in np.ndindex(2, 4):
            keys, values = (np.asarray(x[layer, 0, head // 2, : p + 1], np.float64) for x in (k, v))
            w = np.exp(keys @ np.asarray(q[layer, i, head], np.float64) / 8**0.5)
            np.testing.assert_allclose(out[i, layer, head], w @ values / w.sum(), rtol=1e-12, atol=1e-14)


def test_error_above_its_bound_is_counted(model, reports, monkeypatch):
    monkeypatch.setattr("certjax.audit.exact", lambda seen, positions: exact(seen, positions) + 10.0)
    report = audit(model, TOKENS, POLICIES["planes"], n_queries=3)
    assert report.violations == 2 * reports["planes"].true.size  # as stored and with fallback
    assert report.broken == 0


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"policy": Policy.paper()}, "'paper'"),
        ({"policy": Policy.budget(0.1, "head")}, "'head'"),
        ({"n_queries": 0}, "n_queries"),
        ({"n_queries": 257}, "n_queries"),
        ({"tokens": [1] * 300}, "multiple of 256"),
    ],
)
def test_what_cannot_be_audited_is_refused(model, options, part):
    with pytest.raises(InvalidArgumentError, match=part):
        audit(model, **{"tokens": [1] * 256, **options})


# -- the report ---------------------------------------------------------------------------------------


def test_heads_above_the_tolerance_come_worst_first(reports):
    report = reports["kivi_int2"]
    for by in ("true", "certified"):
        listed = report.worst_heads(by)
        errors = [head[by] for head in listed]
        assert errors == sorted(errors, reverse=True) and len(listed) == report.true[0].size
        assert errors[0] == report.heads[f"{by}_max"][listed[0]["layer"], listed[0]["head"]]
    some = dataclasses.replace(report, policy=Policy.budget(float(np.median(report.heads["true_max"]))))
    assert len(some.worst_heads()) == report.true[0].size // 2


def test_dict_is_json_even_where_a_bound_is_infinite(reports):
    report = reports["kivi_int2"]
    broken = report.certified.copy()
    broken[0, 1, 2] = np.inf
    payload = strict_json(json.dumps(dataclasses.replace(report, certified=broken).to_dict()))
    assert payload["heads"]["certified_max"][1][2] is None and payload["layers"][1]["certified_max"] is None
    assert payload["heads_above_tolerance"]["certified"][0] == {
        "layer": 1, "head": 2, "true": report.heads["true_max"][1, 2], "certified": None,
    }  # fmt: skip
    assert payload["total"]["head_steps"] == sum(layer["head_steps"] for layer in payload["layers"])


def test_conclusion_counts_what_went_wrong(reports):
    report = reports["planes"]
    assert conclusion(report).startswith("True error above 1000% of the layer norm on 0 of 24 head-steps; certified")
    assert "bug" in conclusion(dataclasses.replace(report, violations=1))
    assert "On 7 a check failed" in conclusion(dataclasses.replace(report, checks_failed=7))


@pytest.mark.parametrize(
    ("x", "text"), [(0, "0%"), (0.05, "5%"), (0.0123, "1.2%"), (0.0996, "10%"), (1.234, "123%"), (None, "inf")]
)
def test_percent(x, text):
    assert percent(x) == text


# -- the command --------------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path):
    (tmp_path / "greeting.txt").write_text(TEXT)
    return tmp_path / "greeting.txt"


def run(checkpoint, file, *arguments, **options):
    command = ["audit", "--model", checkpoint, "--text", file, *arguments]
    return CliRunner().invoke(main, [str(a) for a in command], **options)


def test_command_prints_json_or_a_table_and_draws(checkpoint, text, tmp_path):
    options = ("--codec", "kivi_int2", "--group-size", 16, "--tokens", N, "--queries", 2, "--tolerance", 0.001)
    result = run(checkpoint, text, *options, "--heatmap", tmp_path / "map.png", "--json")
    assert result.exit_code == 0, result.output
    payload = strict_json(result.stdout)
    assert payload.keys() == {"text", "device", "report"} and payload["text"] == "greeting"
    report = payload["report"]
    assert report["violations"] == 0 and report["tokens"] == 512 and report["positions"] == [383, 511]
    assert np.shape(report["heads"]["true_max"]) == (2, 4) and len(report["layers"]) == 2
    assert report["policy"]["codec"] == "kivi_int2" and report["policy"]["tolerance"] == 0.001
    assert len(report["heads_above_tolerance"]["certified"]) == 8

    image = imread(tmp_path / "map.png")
    assert min(image.shape[:2]) > 300 and len(np.unique(image.reshape(-1, image.shape[-1]), axis=0)) > 50

    result = run(checkpoint, text, *options)
    assert result.exit_code == 0, result.output
    for part in ("greeting, 512 tokens", "kivi_int2, key_bits=2", "bytes a token", "certified max", "\n  all "):
        assert part in result.stdout
    assert "of 16 head-steps; certified within 0.1% as stored on" in result.stdout.splitlines()[-1]


@pytest.fixture
def asked(monkeypatch, reports):
    """The command's calls of the library, which answers with a report that is already there."""
    calls = []

    def answer(model, tokens, policy, **options):
        calls.append((tokens, policy, options))
        return answer.report

    answer.report, answer.calls = reports["planes"], calls
    monkeypatch.setattr("certjax.cli.audit.audit", answer)
    return answer


def test_options_reach_the_policy(checkpoint, text, asked):
    for arguments in (
        ["--codec", "planes", "--key-planes", "8", "--value-planes", "4,4", "--no-windows", "--queries", 5],
        ["--codec", "fp8_e4m3", "--fp8-scale", "head", "--block-size", 32, "--tolerance", 0.1],
        ["--codec", "kivi_int2", "--group-size", 16],
    ):
        assert run(checkpoint, text, *arguments, "--json").exit_code == 0
    assert [policy for _, policy, _ in asked.calls] == [
        Policy.budget(0.05, codec="planes", key_planes=(8,), value_planes=(4, 4), **NO_WINDOWS),
        Policy.budget(0.1, codec="fp8_e4m3", fp8_scale="head", block_size=32),
        Policy.budget(0.05, codec="kivi_int2", group_size=16),
    ]
    assert asked.calls[0][2] == {"n_queries": 5, "progress": False}


def test_text_is_cut_to_whole_chunks_of_what_is_allowed(checkpoint, text, asked):
    for arguments in (["--tokens", 700], []):
        assert run(checkpoint, text, *arguments, "--json").exit_code == 0
    assert run(checkpoint, "-", "--json", input=TEXT[:3000]).exit_code == 0
    assert [len(tokens) for tokens, _, _ in asked.calls] == [512, 768, 768]
    assert run(checkpoint, "-", input=TEXT).stdout.count("stdin, ") == 1


@pytest.mark.parametrize("field", ["violations", "broken"])
def test_status_says_that_a_bound_failed(checkpoint, text, asked, field):
    asked.report = dataclasses.replace(asked.report, **{field: 1})
    result = run(checkpoint, text)
    assert result.exit_code == 1 and "a bug in certjax" in result.stdout
    result = run(checkpoint, text, "--json")
    assert result.exit_code == 1 and strict_json(result.stdout)["report"]["violations"] == asked.report.violations


BAD_OPTIONS = {
    "tolerance of zero": (["--tolerance", 0], "tolerance must be positive, got 0"),
    "planes without a number": (["--key-planes", "8,x"], "--key-planes"),
    "planes of three bits": (["--key-planes", "3"], "key_planes must be widths"),
    "another codec's option": (["--codec", "fp8_e4m3", "--group-size", 8], "--group-size is no option of --codec"),
    "too few tokens": (["--tokens", 255], "--tokens"),
    "too many queries": (["--queries", 257], "--queries"),
    "heat map in no directory": (["--heatmap", "nowhere/map.png"], "no directory nowhere"),
    "heat map of no kind": (["--heatmap", "map.xyz"], "map.xyz: name a file that ends in one of"),
}


@pytest.mark.parametrize(("options", "part"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_option_is_a_message_and_a_status(checkpoint, text, options, part):
    assert_message(run(checkpoint, text, *options), part)


def test_text_that_cannot_be_audited_is_refused(checkpoint, source, text, tmp_path):
    text.write_text("hello " * 10)
    assert_message(run(checkpoint, text), "--text has", "needs 256; give a longer text")
    text.write_bytes(b"\xff\xfe" * 100)
    assert_message(run(checkpoint, text), "is not UTF-8")
    assert_message(run(checkpoint, tmp_path / "nowhere.txt"), "--text", "nowhere.txt")
    text.write_text(TEXT)
    assert_message(run(source("small"), text), "an audit needs 256 tokens, the context of --model", "is 128")
    without = source("without")
    (without / "tokenizer.json").unlink()
    assert_message(run(without, text), "no tokenizer.json")


def test_heat_map_without_matplotlib_names_the_extra(checkpoint, text, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run(checkpoint, text, "--heatmap", tmp_path / "map.png")
    assert_message(result, 'pip install "certjax[eval]"')

"""Lines of JSON: what is written is read again, and what a kill leaves behind."""

import dataclasses
import gzip
import json
import lzma

import pytest

from certjax import InvalidArgumentError
from certjax.eval import records
from certjax.eval.records import CertificateSummary, Record
from certjax.eval.run import check_out

INFINITY = float("inf")
SUMMARY = CertificateSummary(
    head_steps=4, rungs=[1, 0, 2, 1, 0], bound_mean=0.125, bound_max=0.5, before_mean=INFINITY, before_max=INFINITY,
    before_layer_mean=0.5, before_layer_max=1.5, before_paper_mean=3.0, before_paper_max=4.0, bytes_read=10.0,
    bytes_paged_in=0.0, bytes_dense=20.0, checks_failed=0, bound_by_head=[[0.5, INFINITY]],
    dense_by_head=[[0.0, 0.25]], promoted_by_head=[[0.0, 2.0]],
)  # fmt: skip
ANSWER = Record(
    benchmark="niah", task="niah", context=2048, sample=3, seed=0, mode="naive", config="ab", versions={"jax": "0"},
    prompt_tokens=7, new_tokens=2, score=0.5, prediction='7\u2028 "x"\n', references=["1", "2"], certificate=SUMMARY,
    seconds=1.5,
)  # fmt: skip
LOSS = Record(
    benchmark="ppl", task="emma", context=64, sample=0, seed=0, mode="dense", config="cd", versions={},
    prompt_tokens=32, new_tokens=2, token_nll=[1.0, 2.0],
)  # fmt: skip


def test_records_are_read_as_they_were_written(tmp_path):
    records.write(tmp_path / "a.jsonl", [ANSWER])
    records.write(tmp_path / "a.jsonl", [LOSS])
    assert list(records.read(tmp_path / "a.jsonl")) == [ANSWER, LOSS]
    assert LOSS.nll == 1.5 and len((tmp_path / "a.jsonl").read_text().split("\n")) == 3


def test_floats_have_six_digits_and_infinities_are_json(tmp_path):
    of = json.loads(dataclasses.replace(LOSS, token_nll=[1 / 3], token_bound=[INFINITY]).to_json())
    assert of["token_nll"] == [0.333333] and of["token_bound"] == [INFINITY]


@pytest.mark.parametrize("cut", [1, 10, -1])
def test_line_that_a_kill_cut_off_is_passed_over_and_repaired(tmp_path, cut):
    path = tmp_path / "a.jsonl"
    records.write(path, [ANSWER])
    whole = path.read_bytes()
    path.write_bytes(whole + LOSS.to_json().encode()[:cut])
    assert list(records.read(path)) == [ANSWER]
    records.repair(path)
    assert path.read_bytes() == whole
    records.write(path, [LOSS])
    assert list(records.read(path)) == [ANSWER, LOSS]


@pytest.mark.parametrize("tool", [gzip, lzma])
def test_compressed_files_are_read_and_not_appended_to(tmp_path, tool):
    path = tmp_path / "a"
    records.write(path, [ANSWER, LOSS])
    whole = tool.compress(path.read_bytes())
    path.write_bytes(whole)
    assert list(records.read(path)) == [ANSWER, LOSS]
    with pytest.raises(InvalidArgumentError, match="compressed"):
        check_out(path)
    path.write_bytes(whole[:-9])
    with pytest.raises(InvalidArgumentError, match="cannot be decompressed"):
        list(records.read(path))


def test_repair_leaves_whole_and_missing_files_alone(tmp_path):
    path = tmp_path / "a.jsonl"
    records.repair(path)
    assert not path.exists()
    records.write(path, [ANSWER, LOSS])
    whole = path.read_bytes()
    records.repair(path)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("line", ["{}", "text", '{"benchmark": 1, "certificate": null}', "[]", "\xff"])
def test_line_that_is_no_record_is_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LOSS.to_json().encode() + b"\n" + line.encode("latin-1") + b"\n")
    with pytest.raises(InvalidArgumentError, match=r"a\.jsonl:2 is no record"):
        list(records.read(path))


def test_other_schema_is_refused(tmp_path):
    records.write(tmp_path / "a.jsonl", [dataclasses.replace(LOSS, schema=99)])
    with pytest.raises(InvalidArgumentError, match="schema 99"):
        list(records.read(tmp_path / "a.jsonl"))

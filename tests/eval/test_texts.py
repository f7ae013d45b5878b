"""Corpora: where they come from, their order, and what is said when they cannot be had."""

import builtins
import sys
import types

import pytest

from certjax.errors import InvalidArgumentError
from certjax.eval import texts
from certjax.eval.texts import NOVELS, corpus


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "certjax" / "texts"


@pytest.fixture
def without(monkeypatch):
    """Makes a package impossible to import."""

    def block(name):
        original = builtins.__import__

        def refuse(module, *args, **kwargs):
            if module == name:
                raise ImportError(f"No module named {name!r}")
            return original(module, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", refuse)

    return block


@pytest.fixture
def fake_datasets(monkeypatch):
    """A `datasets` that knows one data set and records how it was asked."""
    calls = []

    class Rows(dict):
        column_names = ("text", "title")

    def load_dataset(path, subset, split):
        calls.append((path, subset, split))
        if path == "absent":
            raise FileNotFoundError("no such data set")
        return Rows(text=["one", " ", "three"], title=["I", "II", "III"])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return calls


def test_novels_are_unpacked_once_and_then_read_from_the_cache(empty_cache, monkeypatch):
    calls = []

    def unpack(scratch):
        calls.append(scratch)
        return {title: f"text of {title}" for title in reversed(NOVELS)}

    monkeypatch.setattr(texts, "_unpack", unpack)
    first = corpus()
    assert list(first) == list(NOVELS)
    assert corpus("austen") == first and first["emma"] == "text of emma"
    assert len(calls) == 1
    assert sorted(file.name for file in empty_cache.iterdir()) == sorted(f"{title}.txt" for title in NOVELS)


def test_novels_incomplete_in_the_cache_are_fetched_again(empty_cache, monkeypatch):
    monkeypatch.setattr(texts, "_unpack", lambda scratch: dict.fromkeys(NOVELS, "whole"))
    empty_cache.mkdir(parents=True)
    (empty_cache / "emma.txt").write_text("part")
    assert set(corpus().values()) == {"whole"}


def test_machine_without_apt_is_told_to_pass_files(empty_cache, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InvalidArgumentError, match=r"apt-get download .* failed .* pass a \.txt file"):
        corpus()


def test_missing_rdata_is_named(empty_cache, without):
    without("rdata")
    with pytest.raises(InvalidArgumentError, match=r"pip install .certjax\[eval\]"):
        corpus()


def test_file_is_a_corpus_of_one(tmp_path):
    file = tmp_path / "story.txt"
    file.write_text("Once upon a time: é.", encoding="utf-8")
    assert corpus(file) == corpus(str(file)) == {"story": "Once upon a time: é."}


def test_directory_is_sorted_and_blank_files_are_left_out(tmp_path):
    for name, text in (("b.txt", "B"), ("a.txt", "A"), ("c.txt", "\n"), ("d.md", "D")):
        (tmp_path / name).write_text(text)
    assert list(corpus(tmp_path).items()) == [("a", "A"), ("b", "B")]


def test_unknown_name_lists_the_choices(tmp_path):
    with pytest.raises(InvalidArgumentError, match="austen.*directory of .txt files.*hf:NAME"):
        corpus(tmp_path / "absent")


def test_directory_without_text_is_refused(tmp_path):
    with pytest.raises(InvalidArgumentError, match="holds no text"):
        corpus(tmp_path)


def test_file_of_another_encoding_is_refused(tmp_path):
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(InvalidArgumentError, match="UTF-8"):
        corpus(tmp_path)


@pytest.mark.parametrize(
    "name, asked, expected",
    [
        ("hf:owner/set", ("owner/set", None, "test"), {"0": "one", "2": "three"}),
        ("hf:owner/set:part:train", ("owner/set", "part", "train"), {"0": "one", "2": "three"}),
        ("hf:owner/set:::title", ("owner/set", None, "test"), {"0": "I", "1": "II", "2": "III"}),
    ],
)
def test_dataset_is_asked_for_its_parts(fake_datasets, name, asked, expected):
    assert corpus(name) == expected
    assert fake_datasets == [asked]


@pytest.mark.parametrize(
    "name, message",
    [
        ("hf:", "names no data set"),
        ("hf:a:b:c:d:e", "names no data set"),
        ("hf:absent", "no such data set.*check name, subset and split"),
        ("hf:owner/set:::body", "no field 'body'; its fields are text, title"),
    ],
)
def test_dataset_that_cannot_be_had_says_why(fake_datasets, name, message):
    with pytest.raises(InvalidArgumentError, match=message):
        corpus(name)


def test_missing_datasets_package_is_named(without):
    without("datasets")
    with pytest.raises(InvalidArgumentError, match="pip install datasets"):
        corpus("hf:owner/set")


@pytest.mark.real
def test_the_novels_are_the_novels():
    novels = corpus()
    assert novels["emma"].startswith("EMMA")
    assert sum(len(text) for text in novels.values()) > 4_000_000

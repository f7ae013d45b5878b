"""Parts of samples: passages, insertion, draws, and the search for the longest text that fits."""

import re
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from certjax.errors import InvalidArgumentError
from certjax.eval.tasks.base import generator
from certjax.eval.tasks.fitting import SLACK, longest
from certjax.eval.tasks.haystack import Essay, Fresh, insert, words


@given(
    slope=st.floats(0.4, 40),
    fixed=st.integers(1, 3000),
    wobble=st.integers(0, 3),
    room=st.integers(1, 200_000),
    minimum=st.integers(1, 300),
)
@example(slope=1.0, fixed=5, wobble=0, room=11, minimum=1)  # the fixed part alone is more than what is left
@example(slope=1.0, fixed=1, wobble=1, room=6, minimum=1)  # two lengths count the same
def test_longest_text_fits_and_wastes_little(slope, fixed, wobble, room, minimum):
    def size(text):
        n = len(text)
        return fixed + int(slope * n) + (n * 7919) % (wobble + 1)

    calls = []

    def build(n):
        calls.append(n)
        return "x" * n

    maximum = max(minimum, room)
    text = longest(build, size, room, minimum, maximum)
    if size("x" * minimum) > room:
        assert len(text) == minimum
    else:
        assert size(text) <= room
        assert len(text) == maximum or room - size(text) <= max(2 * slope + 2 * wobble + 2, 2 * SLACK * room)
    assert len(calls) <= 12


@given(st.lists(st.text(min_size=1), max_size=30), st.lists(st.floats(0, 1), max_size=10))
def test_insertion_keeps_the_units_and_puts_needles_at_their_depths(units, depths):
    result = insert(units, [(depth, (depth,)) for depth in depths])
    assert [unit for unit in result if isinstance(unit, str)] == units
    for depth in depths:
        before = result[: result.index((depth,))]
        assert sum(isinstance(unit, str) for unit in before) == int(len(units) * depth)


def test_sentences_end_where_they_end():
    text = "Mr. and Mrs. Bennet came. \"Do you?\" he said. 'No!' It was 3.5 miles. The end"
    whole = {" ".join(Essay(text, generator("x", 0, 0, i)).sentences(15)) for i in range(50)}
    starts = {passage.split()[0] for passage in whole}
    assert starts == {"Mr.", '"Do', "he", "'No!'", "It", "The"}


def test_passage_goes_on_at_the_beginning_and_is_never_longer_than_the_text():
    essay = Essay("One two. Three four.", generator("x", 0, 0, 0))
    assert sorted(essay.sentences(4)) == ["One two.", "Three four."]
    with pytest.raises(InvalidArgumentError, match="has 4 words, this context needs 5; pass a longer text"):
        essay.sentences(5)


@pytest.mark.parametrize("kind, form", [("numbers", r"\d{7}"), ("words", r".+-.+"), ("uuids", r"[0-9a-f-]{36}")])
def test_draws_have_their_form_and_never_repeat(kind, form):
    fresh = Fresh(generator("x", 0, 0, 0))
    drawn = [fresh.draw(kind) for _ in range(300)]
    assert len(set(drawn)) == 300 and all(re.fullmatch(form, one) for one in drawn)


def test_missing_wonderwords_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    words.cache_clear()
    with pytest.raises(InvalidArgumentError, match=r"package wonderwords: pip install .certjax\[eval\]"):
        words("noun")

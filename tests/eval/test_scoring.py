"""Scores equal those of RULER and of lm-evaluation-harness on the same outputs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from certjax.errors import InvalidArgumentError
from certjax.eval.scoring import METRICS, cleaned, score

# Output, references, scores "all" and "part". Computed by `postprocess_pred` (scripts/eval/evaluate.py), then
# `string_match_all` and `string_match_part` (scripts/eval/synthetic/constants.py) of NVIDIA/RULER at commit c3f5e3b,
# which round to two decimals of a percent; lm_eval 0.4.13 (lm_eval/tasks/ruler/common_utils.py) gave the same "all".
RULER_SCORES = [
    (" 1234567.", ("1234567",), 100.0, 100.0),
    (" 1234567, 2345678, 345678 and 4567890", ("1234567", "2345678", "3456789", "4567890"), 75.0, 100.0),
    ("ABCDE, FGHIJ\nKLMNO", ("ABCDE", "fghij", "KLMNO", "PQRST", "UVWXY"), 60.0, 100.0),
    ("1. Apple 2. pear 3. applesauce", ("apple", "Pear", "plum"), 66.67, 100.0),
    ("the answer\tis Norman\x00dy", ("Normandy",), 0.0, 0.0),
    ("new\nline", ("new\tline", "new\nline"), 50.0, 100.0),
    ("new\tline", ("new\tline", "new\nline"), 50.0, 100.0),
    ("  \x1f\n ", ("x",), 0.0, 0.0),
    ("", ("a", "b"), 0.0, 0.0),
    ("France.", ("France", "in France", "France"), 66.67, 100.0),
    ("10th and 11th centuries", ("in the 10th and 11th centuries", "10th and 11th centuries"), 50.0, 100.0),
    ("STRASSE", ("straße", "strasse"), 50.0, 100.0),
    ("İstanbul", ("istanbul", "i̇stanbul"), 50.0, 100.0),
    ("no", ("yes", "Yes.", "of course"), 0.0, 0.0),
]


@pytest.mark.parametrize("output, references, every, some", RULER_SCORES)
def test_scores_are_rulers(output, references, every, some):
    assert round(100 * score(output, references, "all"), 2) == every
    assert round(100 * score(output, references, "part"), 2) == some


@pytest.mark.parametrize("output, references", [row[:2] for row in RULER_SCORES])
def test_scores_are_those_of_the_installed_lm_eval(output, references):
    pytest.importorskip("lm_eval", reason="compares with lm-evaluation-harness: pip install lm_eval transformers")
    theirs = pytest.importorskip("lm_eval.tasks.ruler.common_utils", reason="needs transformers")
    document = {"max_length": 4096, "outputs": list(references)}
    assert score(output, references, "all") == theirs.process_results(document, [output])["4096"]
    # Its "part" is RULER's where there is one reference (see certjax.eval.scoring).
    if len(references) == 1:
        assert score(output, references, "part") == theirs.process_results_part(document, [output])["4096"]


@given(st.text(), st.lists(st.text(min_size=1), min_size=1, max_size=5))
def test_all_is_at_most_part_and_both_are_shares(prediction, references):
    every, some = (score(prediction, references, metric) for metric in METRICS)
    assert 0 <= every <= some <= 1 and some in (0, 1)
    assert (every == 0) == (some == 0)


@given(st.text(st.characters(codec="ascii", exclude_categories=("Cc",)), min_size=1), st.text(), st.text())
def test_reference_in_the_output_is_found_whatever_its_case(reference, before, after):
    reference = reference.strip()
    assert score(f"x{before}{reference.swapcase()}{after}x", [reference]) == 1


@given(st.text())
def test_cleaning_twice_changes_nothing_more(prediction):
    assert cleaned(cleaned(prediction)) == cleaned(prediction)


def test_unknown_metric_and_no_references_are_refused():
    with pytest.raises(InvalidArgumentError, match="unknown metric 'any'; choose one of all, part"):
        score("a", ["a"], "any")
    with pytest.raises(InvalidArgumentError, match="no references"):
        score("a", [])

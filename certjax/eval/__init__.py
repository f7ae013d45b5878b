"""Evaluation: perplexity, needles in a haystack and RULER in every mode on the same samples, with paired statistics."""

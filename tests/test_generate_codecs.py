"""Generation in every mode with every codec, on a tiny random model whose prompt outgrows the windows."""

import dataclasses

import jax
import numpy as np
import pytest

from certjax import Model, Policy, generate
from certjax.codecs import REGISTRY
from certjax.models.llama.modeling import init_params
from tests.models import tiny

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = dataclasses.replace(tiny.GQA, n_layers=2, head_dim=32, context_length=300, kv_dtype="float16")
PROMPT = tiny.tokens(CONFIG, 150).tolist()
NEW = 20  # a block is closed on the way
POLICIES = {"budget": Policy.budget, "paper": Policy.paper, "observe": Policy.observe}


@pytest.fixture(scope="module")
def model():
    return Model(CONFIG, init_params(CONFIG, jax.random.key(1)), None, "tiny")


every_codec = pytest.mark.parametrize(
    "codec", [pytest.param(c, marks=() if c == "planes" else pytest.mark.long) for c in sorted(REGISTRY)]
)


@pytest.mark.parametrize("kind", ["budget", "observe", pytest.param("paper", marks=pytest.mark.long)])
@every_codec
def test_certified_generation(model, codec, kind):
    policy = POLICIES[kind](codec=codec, sink_tokens=16, recent_tokens=16)
    result = generate(model, PROMPT, max_new_tokens=NEW, policy=policy)
    record = result.telemetry.certificate
    assert len(result.tokens[0]) == NEW
    assert np.isfinite(record.e_total).all() and (record.e_total > 0).all()
    assert record.precondition_ok.all() and record.canary_ok.all()
    assert ((record.e_total <= record.tolerance) | (record.rung >= 3)).all()
    assert (record.bytes_read.sum(-1) > 0).all()
    report = result.report()
    assert report.policy["codec"] == codec and report.certificate["bytes_read_per_step"] > 0


@every_codec
def test_naive_generation_equals_observed(model, codec):
    """Naive mode reads what the observe policy certifies: the same tokens."""
    policy = Policy.observe(codec=codec, sink_tokens=16, recent_tokens=16)
    naive = generate(model, PROMPT, max_new_tokens=NEW, mode="naive", policy=policy)
    observed = generate(model, PROMPT, max_new_tokens=NEW, policy=policy)
    np.testing.assert_array_equal(naive.tokens[0], observed.tokens[0])
    assert naive.cache_bytes["tier2"] == 0 < naive.cache_bytes["tier1"]

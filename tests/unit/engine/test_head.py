"""Log-probabilities from logits: exact, deterministic, and honest about numbers that are not numbers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallow.domain.errors import NumericFault
from fallow.engine.head import log_probabilities, top_ids, top_log_probabilities


@given(st.integers(0, 1 << 30), st.integers(1, 5000), st.integers(1, 80), st.sampled_from([1, 4, 1000]))
def test_the_top_is_what_sorting_everything_gives(seed, vocabulary, k, levels):
    """Few levels make many ties, which go to the lower id."""
    logits = np.random.default_rng(seed).integers(0, levels, vocabulary).astype(np.float32)
    expected = np.argsort(-logits, kind="stable")[:k]
    assert np.array_equal(top_ids(logits, k), expected)
    ids, values = top_log_probabilities(logits.copy(), min(k, vocabulary))
    assert np.array_equal(ids, expected)
    assert np.array_equal(values, log_probabilities(logits.copy())[ids])


@given(st.integers(0, 1 << 30), st.floats(-1e4, 1e4))
def test_probabilities_sum_to_one_wherever_the_logits_lie(seed, offset):
    logits = (np.random.default_rng(seed).standard_normal(3000) * 5 + offset).astype(np.float32)
    assert abs(np.exp(log_probabilities(logits)).sum(dtype=np.float64) - 1.0) < 1e-4


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("at", [0, 700, 2999])
def test_logits_that_are_not_finite_are_a_fault(bad, at):
    logits = np.zeros(3000, np.float32)
    logits[at] = bad
    for compute in (log_probabilities, lambda x: top_log_probabilities(x, 1), lambda x: top_log_probabilities(x, 64)):
        with pytest.raises(NumericFault), np.errstate(invalid="ignore"):
            compute(logits.copy())


def test_a_forbidden_token_has_no_probability():
    logits = np.zeros(100, np.float32)
    logits[3] = -np.inf
    assert log_probabilities(logits)[3] == -np.inf

"""`model check` on a small checkpoint: what it measures, and what it refuses."""

import pytest
from checkpoints import FIXTURES

from fallow.domain.errors import ModelError
from fallow.domain.model import Quantisation
from fallow.models.check import check_model
from fallow.models.importer import import_model
from fallow.models.store import Store


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


def test_float32_agrees_with_itself_and_less_precision_agrees_less(store):
    reports = {}
    for quantisation in Quantisation:
        manifest = import_model(FIXTURES / "qwen3", store, quantisation).manifest
        reports[quantisation] = check_model(manifest, store, FIXTURES / "qwen3", "the quick brown fox " * 12)
    exact, eight, four = (
        reports[quantisation] for quantisation in (Quantisation.F32, Quantisation.Q8, Quantisation.Q4)
    )
    assert exact.agreement == 1.0
    assert abs(exact.perplexity_change) < 1e-5
    assert exact.within_bounds
    assert exact.tokens > 40
    assert exact.reference_perplexity == eight.reference_perplexity
    assert abs(eight.perplexity_change) < abs(four.perplexity_change)


def test_another_models_checkpoint_is_refused(store):
    manifest = import_model(FIXTURES / "qwen2", store, Quantisation.F32).manifest
    with pytest.raises(ModelError, match="shapes differ"):
        check_model(manifest, store, FIXTURES / "llama")

"""The default model at 8 bits keeps what `fallow model check` promises: its first choices, and its perplexity."""

from pathlib import Path

from fallow.models.check import check_model
from fallow.models.default import default_gguf
from fallow.models.store import Store


def test_the_default_model_agrees_with_its_float32_reference(store: Path) -> None:
    (_, manifest), *_ = Store(store).models()
    report = check_model(manifest, Store(store), default_gguf())
    assert report.tokens > 400
    assert report.within_bounds, f"{report.agreement:.1%} agree, perplexity {report.perplexity_change:+.2%}"

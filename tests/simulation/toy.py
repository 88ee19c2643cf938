"""The shape of the model that tests of the fleet serve: it is never computed, only placed, routed and told about."""

from fallow.domain.model import Family, ModelConfig


def toy_config(layer_count: int) -> ModelConfig:
    """A decoder of so many layers, as small as one can be."""
    return ModelConfig(
        family=Family.LLAMA, layer_count=layer_count, hidden_size=32, head_count=2, kv_head_count=1, head_dim=16,
        intermediate_size=64, vocab_size=512, context_length=4096, norm_epsilon=1e-5, rope_theta=1e4,
    )  # fmt: skip

"""Whether `replay.py` may be used here: a tiny layer, computed both ways, must give the same bits."""

from functools import lru_cache

import numpy as np

from fallow.domain.errors import EngineError
from fallow.domain.model import Family, ModelConfig, Quantisation, Span
from fallow.engine.graph import piece_graph, rope_tables
from fallow.engine.piece import Piece, PieceShape, Workspace
from fallow.engine.replay import IMAGES, can_map
from fallow.engine.weights import Weights

_TINY = ModelConfig(
    family=Family.LLAMA, layer_count=2, hidden_size=32, head_count=4, kv_head_count=2, head_dim=16,
    intermediate_size=32, vocab_size=32, context_length=128, norm_epsilon=1e-5, rope_theta=1e4,
)  # fmt: skip
_MAX_LEN = 128
_ROWS = IMAGES + 4
"""One call that is full, and one that is not."""


@lru_cache(maxsize=1)
def replay_works() -> bool:
    """Checked once a process; takes a few milliseconds."""
    shape = PieceShape(config=_TINY, quantisation=Quantisation.F32, slots=2, max_len=_MAX_LEN, threads=1)
    if not can_map(_TINY.kv_head_count, _TINY.head_dim, shape.threads):
        return False
    try:
        return _agrees(shape, np.random.default_rng(0))
    except (EngineError, OSError):
        return False


def _agrees(shape: PieceShape, random: np.random.Generator) -> bool:
    span = Span(0, 1)
    weights = Weights()
    for name, (_, size) in piece_graph(_TINY, shape.quantisation, span, _MAX_LEN).initialisers.items():
        weights.arrays[name] = random.standard_normal(size, np.float32)
    weights.arrays["rope.cos"], weights.arrays["rope.sin"] = rope_tables(_TINY, _MAX_LEN)
    space = Workspace(_TINY, shape.quantisation, shape.slots)
    piece = Piece(shape, span, weights, space)
    x = random.standard_normal((_ROWS, _TINY.hidden_size), np.float32)
    alone = []
    for position, row in enumerate(x):
        space.x[0] = row
        space.decode_at(np.array([position]))
        piece.run(0, 1, 1)
        alone.append(space.y[0].copy())
    return bool(np.array_equal(piece.replay(1, 0, x), np.array(alone)))

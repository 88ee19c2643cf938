"""Which matrix products take activations of 16 bits. Pure: the model's shape decides, so that all devices decide alike.

The kernels round activations to 8 bits, in blocks of 32 that share a scale. Where one channel of a block is far larger
than the others, little is left of those. Which products suffer was measured (`docs/adr/0005-activation-precision.md`):
the one into queries, keys and values in every layer; the one out of the feed-forward block in the first third, whose
errors all later layers inherit; all three of that block in the layers next to the embedding and to the head, as in
llama.cpp's `use_more_bits`. The output of attention is smooth, and 8 bits do. At 4 bits the weights' own error is
twenty times larger, and nothing is gained.
"""

from enum import StrEnum

from fallow.domain.model import Quantisation

EDGE_PART = 8
"""The first and the last eighth of the layers are next to the embedding and to the head."""
EARLY_PART = 3
"""The first third of the layers."""


class Activations(StrEnum):
    """How a product rounds its input: once to 8 bits, or a second time for what the first rounding left."""

    INT8 = "int8"
    INT16 = "int16"


class Matrix(StrEnum):
    """The matrices of a layer, as its graph names them."""

    QKV = "qkv"
    ATTENTION_OUT = "attention_out"
    GATE = "gate"
    UP = "up"
    DOWN = "down"


def activations(stored: Quantisation, layer: int, layer_count: int, matrix: Matrix) -> Activations:
    """The activations of one product. `stored`: how the layers' matrices are; 32-bit ones round nothing at all."""
    if stored is not Quantisation.Q8 or matrix is Matrix.ATTENTION_OUT:
        return Activations.INT8
    if matrix is Matrix.QKV or _at_edge(layer, layer_count):
        return Activations.INT16
    early = layer < layer_count // EARLY_PART
    return Activations.INT16 if matrix is Matrix.DOWN and early else Activations.INT8


def _at_edge(layer: int, layer_count: int) -> bool:
    return layer < layer_count // EDGE_PART or layer >= (EDGE_PART - 1) * layer_count // EDGE_PART

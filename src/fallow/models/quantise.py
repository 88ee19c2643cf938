"""Symmetric block quantisation: 8 and 4 bits, blocks of 32 along the input axis, float32 scales. Pure numpy.

value = (q - zero) * scale with zero 128 (8-bit) or 8 (4-bit); 4-bit values are packed two a byte, low nibble first.
GGUF's Q8_0 and Q4_0 carry over exactly, because they are the same arithmetic with float16 scales and another nibble
order. Functions take `[n, K]` rows and assume that 32 divides K; `manifest.check_quantisable` has checked it.
"""

import numpy as np
from numpy.typing import NDArray

from fallow.domain.model import Quantisation
from fallow.models.tensors import BLOCK

Q8_ZERO = 128
Q4_ZERO = 8
Q4_POSITIONS = np.arange(7.0, 9.01, 0.25, dtype=np.float32)
"""Where the search puts a block's extreme value on the grid of -8 to 7; the range of ggml's `make_qx_quants`."""

Q4_1_STEPS_MAX = 16
"""Most 8-bit steps that one 4-bit step is divided into; 15 * 16 nearly fills 8 bits."""

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Quantised = tuple[Bytes, Floats]
"""uint8 `[n, K/32, 32 or 16]` and float32 scales `[n, K/32]`."""


def q8_from_values(values: Floats) -> Quantised:
    """Round to nearest, with the block's largest magnitude at 127."""
    blocks = values.reshape(values.shape[0], -1, BLOCK)
    scales = np.abs(blocks).max(axis=-1) / np.float32(127)
    steps = np.multiply(blocks, _inverse(scales)[..., None])
    np.rint(steps, out=steps)
    steps += Q8_ZERO
    return steps.clip(0, 255, out=steps).astype(np.uint8), scales


def q4_from_values(values: Floats) -> Quantised:
    """Per block, the scale of least squared error among a few candidates, each refined by least squares.

    A candidate puts the block's extreme value at -8 ± 1, so scales may be negative. For fixed steps s the best scale is
    Σxs/Σs², and it leaves the error Σx² - (Σxs)²/Σs²; the largest (Σxs)²/Σs² wins. After ggml's `make_qx_quants`.
    """
    blocks = values.reshape(values.shape[0], -1, BLOCK)
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=-1)[..., None], axis=-1)[..., 0]
    blocks = blocks * _inverse(extreme)[..., None]  # the extreme is 1 now, so that no square overflows or vanishes
    best_gain = np.full(extreme.shape, -1.0, dtype=np.float32)
    scales = np.zeros(extreme.shape, dtype=np.float32)
    for position in Q4_POSITIONS:
        steps = _q4_steps(blocks, np.float32(-position))
        cross = np.einsum("nbk,nbk->nb", blocks, steps)
        norm = np.einsum("nbk,nbk->nb", steps, steps)
        scale = np.divide(cross, norm, out=np.zeros_like(cross), where=norm > 0)
        gain = cross * scale
        better = gain > best_gain
        best_gain = np.where(better, gain, best_gain)
        scales = np.where(better, scale, scales)
    steps = _q4_steps(blocks, _inverse(scales)[..., None])
    steps += Q4_ZERO
    return pack_nibbles(steps.astype(np.uint8)), scales * extreme


def q8_from_gguf_q8_0(raw: Bytes) -> Quantised:
    """Rows of 34-byte blocks (float16 scale, 32 int8), exactly."""
    blocks = raw.reshape(raw.shape[0], -1, 34)
    return blocks[..., 2:] ^ np.uint8(0x80), _half_scales(blocks)


def q8_from_gguf_q4_0(raw: Bytes) -> Quantised:
    """Rows of 18-byte blocks (float16 scale, 16 bytes of nibbles), exactly, in the wider type."""
    blocks = raw.reshape(raw.shape[0], -1, 18)
    return _gguf_nibbles(blocks) + np.uint8(Q8_ZERO - Q4_ZERO), _half_scales(blocks)


def q8_from_gguf_q4_1(raw: Bytes) -> Quantised:
    """Rows of 20-byte blocks (float16 d and m, 16 bytes of nibbles; value = d * q + m), nearly exactly.

    With a scale of d / k every step of d is a whole number of steps, and all that is rounded is m. Of the k that fit
    into 8 bits the one is taken whose multiples come closest to m: a fifth of the error of rounding every value.
    Blocks that no k fits (m much larger than d) are rounded like any others.
    """
    blocks = raw.reshape(raw.shape[0], -1, 20)
    pairs = np.ascontiguousarray(blocks[..., :4]).view("<f2").astype(np.float32)
    delta, least = pairs[..., 0], pairs[..., 1]
    steps, scales = _q4_1_steps(delta, least)
    offset = np.rint(least * _inverse(scales)) + Q8_ZERO
    # No sum leaves 0 to 255: `_q4_1_steps` kept the block's largest magnitude at 127 steps or less.
    nibbles = _gguf_nibbles(blocks[..., 2:])
    quantised = nibbles * steps[..., None] + offset.astype(np.uint8)[..., None]
    odd = steps == 0
    if odd.any():
        values = nibbles[odd] * delta[odd][:, None] + least[odd][:, None]
        plain, plain_scales = q8_from_values(values)
        quantised[odd], scales[odd] = plain[:, 0], plain_scales[:, 0]
    return quantised, scales


def q4_from_gguf_q4_0(raw: Bytes) -> Quantised:
    """As above, exactly, in the same width: element i and i+16 share a byte there, 2i and 2i+1 here."""
    blocks = raw.reshape(raw.shape[0], -1, 18)
    return pack_nibbles(_gguf_nibbles(blocks)), _half_scales(blocks)


def dequantise(quantised: Bytes, scales: Floats, quantisation: Quantisation) -> Floats:
    """Back to float32 `[n, K]`."""
    if quantisation is Quantisation.Q4:
        steps = unpack_nibbles(quantised).astype(np.float32) - np.float32(Q4_ZERO)
    else:
        steps = quantised.astype(np.float32) - np.float32(Q8_ZERO)
    steps *= scales[..., None]
    return steps.reshape(scales.shape[0], -1)


def pack_nibbles(steps: Bytes) -> Bytes:
    """`[..., 2n]` values below 16 to `[..., n]` bytes, low nibble first."""
    return steps[..., 0::2] | (steps[..., 1::2] << np.uint8(4))


def unpack_nibbles(packed: Bytes) -> Bytes:
    """The inverse of `pack_nibbles`."""
    return np.stack((packed & np.uint8(15), packed >> np.uint8(4)), axis=-1).reshape(*packed.shape[:-1], -1)


def _q4_1_steps(delta: Floats, least: Floats) -> tuple[Bytes, Floats]:
    """Per block, how many 8-bit steps make one 4-bit step (0: none fits), and the scale that follows."""
    largest = np.maximum(np.abs(least), np.abs(least + 15 * delta))
    best_error = np.full(delta.shape, np.inf, dtype=np.float32)
    best = np.zeros(delta.shape, dtype=np.uint8)
    for steps in range(1, Q4_1_STEPS_MAX + 1):
        scale = delta / np.float32(steps)
        error = np.abs(least - scale * np.rint(least * _inverse(scale)))
        better = (error < best_error) & (largest <= 127 * np.abs(scale)) & (delta != 0)
        best_error = np.where(better, error, best_error)
        best = np.where(better, np.uint8(steps), best)
    return best, np.asarray(delta / np.maximum(best, 1), dtype=np.float32)


def _q4_steps(blocks: Floats, inverse_scales: Floats | np.float32) -> Floats:
    steps = np.multiply(blocks, inverse_scales)
    np.rint(steps, out=steps)
    return steps.clip(-Q4_ZERO, 15 - Q4_ZERO, out=steps)


def _inverse(scales: Floats) -> Floats:
    """1/scale, and 0 where the scale is 0 or too small to have an inverse: such a block is all zeros."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / scales
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def _gguf_nibbles(blocks: Bytes) -> Bytes:
    packed = blocks[..., 2:]
    return np.concatenate((packed & np.uint8(15), packed >> np.uint8(4)), axis=-1)


def _half_scales(blocks: Bytes) -> Floats:
    return np.ascontiguousarray(blocks[..., :2]).view("<f2")[..., 0].astype(np.float32)

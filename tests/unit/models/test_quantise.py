"""Block quantisation: exact where it promises to be, close where it cannot be, and stable on ugly input."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fallow.domain.model import Quantisation
from fallow.models import quantise

FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)
ROWS = hnp.arrays(np.float32, st.sampled_from([(1, 32), (3, 64), (2, 96)]), elements=FLOATS)
NORMAL = np.random.default_rng(7).standard_normal((256, 256), dtype=np.float32)


def relative(values, back) -> float:
    return float(np.linalg.norm(back - values) / np.linalg.norm(values))


@settings(max_examples=150, deadline=None)
@given(values=ROWS)
def test_eight_bits_are_off_by_half_a_step_at_most(values):
    quantised, scales = quantise.q8_from_values(values)
    assert quantised.shape == (values.shape[0], values.shape[1] // 32, 32)
    assert (quantised.dtype, scales.dtype) == (np.uint8, np.float32)
    back = quantise.dequantise(quantised, scales, Quantisation.Q8).reshape(quantised.shape)
    error = np.abs(back.astype(np.float64) - values.reshape(quantised.shape))
    assert np.all(error <= 0.5001 * scales[..., None] + 1e-37)


@settings(max_examples=150, deadline=None)
@given(values=ROWS)
def test_four_bits_are_never_worse_than_nothing(values):
    quantised, scales = quantise.q4_from_values(values)
    assert quantised.shape == (values.shape[0], values.shape[1] // 32, 16)
    back = quantise.dequantise(quantised, scales, Quantisation.Q4).astype(np.float64)
    assert np.linalg.norm(back - values) <= np.linalg.norm(values.astype(np.float64)) * 0.5 + 1e-30


def test_the_search_beats_the_plain_scale():
    quantised, scales = quantise.q4_from_values(NORMAL)
    searched = relative(NORMAL, quantise.dequantise(quantised, scales, Quantisation.Q4))
    plain = relative(NORMAL, dequantize(quantize(NORMAL, GGMLQuantizationType.Q4_0), GGMLQuantizationType.Q4_0))
    assert searched < 0.95 * plain


@pytest.mark.parametrize(
    ("kind", "convert", "quantisation"),
    [
        (GGMLQuantizationType.Q8_0, quantise.q8_from_gguf_q8_0, Quantisation.Q8),
        (GGMLQuantizationType.Q4_0, quantise.q4_from_gguf_q4_0, Quantisation.Q4),
        (GGMLQuantizationType.Q4_0, quantise.q8_from_gguf_q4_0, Quantisation.Q8),
    ],
)
def test_gguf_blocks_carry_over_exactly(kind, convert, quantisation):
    raw = quantize(NORMAL, kind)
    raw[0, :34] = 0  # a block whose scale is zero
    quantised, scales = convert(raw)
    np.testing.assert_array_equal(quantise.dequantise(quantised, scales, quantisation), dequantize(raw, kind))


def test_every_8_bit_value_carries_over():
    raw = np.zeros((8, 34), dtype=np.uint8)
    raw[:, :2] = np.frombuffer(np.float16(0.5).tobytes(), dtype=np.uint8)
    raw[:, 2:] = np.arange(256, dtype=np.uint8).reshape(8, 32)
    back = quantise.dequantise(*quantise.q8_from_gguf_q8_0(raw), Quantisation.Q8)
    np.testing.assert_array_equal(back.ravel(), np.arange(256, dtype=np.uint8).view(np.int8) * np.float32(0.5))


@given(steps=hnp.arrays(np.uint8, (2, 3, 32), elements=st.integers(0, 15)))
def test_nibbles_are_packed_low_first(steps):
    packed = quantise.pack_nibbles(steps)
    assert packed[0, 0, 0] == steps[0, 0, 0] + 16 * steps[0, 0, 1]
    np.testing.assert_array_equal(quantise.unpack_nibbles(packed), steps)


def test_zeros_and_denormals_stay_finite():
    values = np.zeros((2, 64), dtype=np.float32)
    values[1, :32] = 1e-42
    for convert, kind in ((quantise.q8_from_values, Quantisation.Q8), (quantise.q4_from_values, Quantisation.Q4)):
        quantised, scales = convert(values)
        back = quantise.dequantise(quantised, scales, kind)
        assert np.isfinite(scales).all()
        np.testing.assert_array_equal(back[0], values[0])
        assert np.abs(back).max() <= 2e-42

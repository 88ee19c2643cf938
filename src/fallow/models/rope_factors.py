"""Llama 3 rope scaling from the per-frequency factors that GGUF stores. Pure.

The factors follow from (factor, low, high, original context L): a frequency f with x = L * f / 2π has factor 1 for
x > high, `factor` for x < low, and 1 / ((1 - s) / factor + s) with s = (x - low) / (high - low) between. Only L/low
and L/high matter, so the solution is a family; it is fixed by low = 1 where that makes L whole. A recovery is accepted
only when it gives back every factor.
"""

import math

import numpy as np
from numpy.typing import NDArray

from fallow.domain.errors import ModelError
from fallow.domain.model import Llama3RopeScaling

TOLERANCE = 2e-5
"""Relative. Factors are float32 of float32 arithmetic."""
PUBLISHED = ((8192, 1.0, 4.0),)
"""(L, low, high) of every Llama 3 release: tried first."""


def llama3_factors(scaling: Llama3RopeScaling, head_dim: int, theta: float) -> NDArray[np.float64]:
    """What each rotary frequency is divided by, float64 `[head_dim / 2]`."""
    return _factors(
        _frequencies(head_dim, theta),
        scaling.factor,
        scaling.original_context_length,
        scaling.low_freq_factor,
        scaling.high_freq_factor,
    )


def recover_llama3_scaling(factors: NDArray[np.float32], theta: float) -> Llama3RopeScaling | None:
    """The scaling that gives these factors `[head_dim / 2]`, or `None` when they are all 1.

    Raises `ModelError` when no llama3 scaling gives them.
    """
    wanted = factors.astype(np.float64)
    if np.allclose(wanted, 1.0, rtol=TOLERANCE, atol=0.0):
        return None
    frequencies = _frequencies(2 * len(wanted), theta)
    factor = _whole(float(wanted.max()))
    candidates = [*PUBLISHED, *_fit(frequencies, wanted, factor)] if wanted.min() > 0.0 else []
    for context, low, high in candidates:
        if np.allclose(_factors(frequencies, factor, context, low, high), wanted, rtol=TOLERANCE, atol=0.0):
            return Llama3RopeScaling(
                factor=factor, low_freq_factor=low, high_freq_factor=high, original_context_length=context
            )
    raise ModelError("tensor 'rope_freqs.weight': its factors are not those of llama3 rope scaling")


def _frequencies(head_dim: int, theta: float) -> NDArray[np.float64]:
    return theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)


def _factors(
    frequencies: NDArray[np.float64], factor: float, context: int, low: float, high: float
) -> NDArray[np.float64]:
    smooth = np.clip((context * frequencies / (2 * math.pi) - low) / (high - low), 0.0, 1.0)
    return np.asarray(1.0 / ((1.0 - smooth) / factor + smooth))


def _fit(
    frequencies: NDArray[np.float64], wanted: NDArray[np.float64], factor: float
) -> list[tuple[int, float, float]]:
    """(L, low, high) from a line through the factors between 1 and `factor`; empty with fewer than two of them."""
    between = (wanted > 1.0 + TOLERANCE) & (wanted < factor * (1.0 - TOLERANCE))
    if factor <= 1.0 or between.sum() < 2:
        return []
    smooth = (1.0 / wanted[between] - 1.0 / factor) / (1.0 - 1.0 / factor)
    slope, intercept = np.polyfit(frequencies[between] / (2 * math.pi), smooth, 1)
    if slope <= 0.0 or intercept >= 0.0:
        return []
    # slope = L / (high - low) and intercept = -low / (high - low); choose low = 1, then make L whole.
    context = max(1, round(-slope / intercept))
    span = context / slope
    low, high = _whole(-intercept * span), _whole((1.0 - intercept) * span)
    return [(context, low, high), (context, -intercept * span, (1.0 - intercept) * span)]


def _whole(value: float) -> float:
    """The nearest multiple of 1/8 when it is that but for rounding."""
    nearest = round(value * 8) / 8
    return nearest if abs(value - nearest) <= 1e-4 * abs(value) else value

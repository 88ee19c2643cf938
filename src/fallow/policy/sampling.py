"""From a next-token distribution to a token, by a recipe. Pure: a gateway and a last stage choose the same.

Order of operations: temperature, top_k, top_p, min_p. Temperature comes before the cuts, as in vLLM and transformers;
each cut sees the distribution that the one before it left, as in llama.cpp. Temperature 0 takes the most probable
token, the lowest id among equals, and draws nothing.

Draws are counted, not consumed: the n-th token's is a function of seed, index and n (Philox: Salmon et al. 2011), so
that it can be had without those before it.

Two machines may differ in the last bit of an exponential, and so, once in very many draws, in a token. Whoever relies
on another's choice compares (`gateway/running_ahead.py`).
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from fallow.domain.sampling import Recipe

GREEDY_BELOW: Final = 1e-5
"""Temperatures below this are 0, as in vLLM: dividing by less overflows."""

NUCLEUS_PROBE: Final = 1024
"""Tokens that are sorted first when looking for the top_p set of a whole vocabulary."""

SEED_BITS: Final = (1 << 64) - 1


def choose(
    ids: NDArray[np.int32], logits: NDArray[np.float32], recipe: Recipe, nth: int, *, complete: bool = False
) -> int:
    """The position in `ids` of an answer's `nth` token, from 0. At least one entry, highest first; `complete`: the
    whole vocabulary, in id order."""
    if recipe.temperature < GREEDY_BELOW:
        return first_best(ids, logits, complete=complete)
    positions, weights = distribution(logits, recipe)
    drawn = draw(weights, uniform(recipe.seed, recipe.index, nth))
    return drawn if positions is None else int(positions[drawn])


def uniform(seed: int, index: int, nth: int) -> float:
    """A number in [0, 1) with 53 random bits."""
    key = seed & SEED_BITS | (index & SEED_BITS) << 64
    return (int(np.random.Philox(key=key, counter=nth).random_raw()) >> 11) * 2.0**-53


def first_best(ids: NDArray[np.int32], logits: NDArray[np.float32], *, complete: bool) -> int:
    """Position of the highest value; that of the lowest id among equals."""
    if complete:
        return int(logits.argmax())
    equals = np.flatnonzero(logits == logits.max())
    return int(equals[ids[equals].argmin()])


def distribution(logits: NDArray[np.float32], recipe: Recipe) -> tuple[NDArray[np.intp] | None, NDArray[np.float64]]:
    """What to draw from: positions into `logits` (`None`: all of them, in order) and their weights `[m]`.

    Weights are not negative, the largest is 1, and they are in proportion to the probabilities. The
    temperature is at least `GREEDY_BELOW`.
    """
    scaled = logits.astype(np.float64)
    scaled -= scaled.max()
    if recipe.temperature != 1.0:
        scaled /= recipe.temperature
    weights = np.exp(scaled, out=scaled)
    positions: NDArray[np.intp] | None = None
    if recipe.top_k is not None and recipe.top_k < len(weights):
        positions = highest(weights, recipe.top_k)
        weights = weights[positions]
    if recipe.top_p < 1.0:
        kept = _nucleus(weights, recipe.top_p)
        positions = kept if positions is None else positions[kept]
        weights = weights[kept]
    if recipe.min_p > 0.0:
        kept = np.flatnonzero(weights >= recipe.min_p * weights.max())
        positions = kept if positions is None else positions[kept]
        weights = weights[kept]
    return positions, weights


def draw(weights: NDArray[np.float64], number: float) -> int:
    """The index that a number in [0, 1) picks from unnormalised weights."""
    cumulative = weights.cumsum()
    index = int(cumulative.searchsorted(number * cumulative[-1], side="right"))
    return min(index, len(weights) - 1)


def highest(weights: NDArray[np.float64], count: int) -> NDArray[np.intp]:
    """Positions of the `count` largest, descending; the first among equals, so that a cut is deterministic."""
    if count >= len(weights) or len(weights) <= NUCLEUS_PROBE:
        return np.argsort(-weights, kind="stable")[:count]
    bound = np.partition(weights, len(weights) - count)[len(weights) - count]
    above = np.flatnonzero(weights > bound)
    equals = np.flatnonzero(weights == bound)[: count - len(above)]
    chosen = np.concatenate((above, equals))
    return chosen[np.argsort(-weights[chosen], kind="stable")]


def _nucleus(weights: NDArray[np.float64], top_p: float) -> NDArray[np.intp]:
    """Positions of the smallest set, most probable first, whose share is at least `top_p`; never empty."""
    target = top_p * weights.sum()
    count = min(NUCLEUS_PROBE, len(weights))
    while True:
        order = highest(weights, count)
        cumulative = weights[order].cumsum()
        if cumulative[-1] >= target or count == len(weights):
            return order[: int(cumulative.searchsorted(target, side="left")) + 1]
        count = min(count * 8, len(weights))

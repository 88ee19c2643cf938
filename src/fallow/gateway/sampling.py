"""From a next-token distribution to a token.

Order of operations: presence and frequency penalties (over generated tokens, as OpenAI defines them and vLLM does),
logit bias, temperature, top_k, top_p, min_p. Temperature comes before the cuts, as in vLLM and transformers; each cut
sees the distribution that the one before it left, as in llama.cpp. Temperature 0 takes the most probable token, the
lowest id among equals, and draws nothing.

A stage's head sends its top 64 tokens unless `needs_full_vocabulary` says otherwise. At temperature 1 and below this
is a top-64 cut in front of the others (llama.cpp cuts at 40 by default), and probabilities are relative to what is
left. Reported log-probabilities are the model's own, before penalties, bias and temperature.

Pure but for the generator's state: one seeded generator a choice, one draw a token.
"""

import msgspec
import numpy as np
from numpy.typing import NDArray

from fallow.gateway.contract import Candidates

HEAD_TOP_K = 64
"""How many candidates a head sends unless it is asked for all."""

GREEDY_BELOW = 1e-5
"""Temperatures below this are 0, as in vLLM: dividing by less overflows."""

NUCLEUS_PROBE = 1024
"""Tokens that are sorted first when looking for the top_p set of a whole vocabulary."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How to choose. Ranges are checked at the edge: temperature >= 0, 0 <= top_p <= 1, 0 <= min_p <= 1."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    """At least 1."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None


class Choice(msgspec.Struct, frozen=True):
    """A chosen token, and its log-probability as the model gave it."""

    token: int
    logprob: float


def needs_full_vocabulary(params: SamplingParams) -> bool:
    """Whether the top 64 could leave out a token that ought to have a chance.

    Penalties and biases can lift a token from below the cut. A temperature above 1 gives the tail weight, unless
    top_k cuts it off anyway.
    """
    if params.logit_bias or params.presence_penalty or params.frequency_penalty:
        return True
    return params.temperature > 1.0 and not (params.top_k is not None and params.top_k <= HEAD_TOP_K)


class Sampler:
    """Chooses the tokens of one choice. `index` tells the choices of one seeded request apart."""

    def __init__(self, params: SamplingParams, seed: int, index: int = 0) -> None:
        self._params = params
        self._greedy = params.temperature < GREEDY_BELOW
        self._adjusts = bool(params.logit_bias or params.presence_penalty or params.frequency_penalty)
        self._generator = np.random.Generator(np.random.PCG64([seed & 0xFFFF_FFFF_FFFF_FFFF, index]))
        self._counts: dict[int, int] = {}
        self._bias_ids = np.fromiter(params.logit_bias.keys(), np.int64, len(params.logit_bias))
        self._bias = np.fromiter(params.logit_bias.values(), np.float32, len(params.logit_bias))

    def choose(self, candidates: Candidates) -> Choice:
        """The next token. `candidates` holds at least one entry, highest first or the whole vocabulary."""
        logits = self._adjusted(candidates) if self._adjusts else candidates.logprobs
        if self._greedy:
            position = _first_best(candidates, logits)
        else:
            positions, weights = distribution(logits, self._params)
            drawn = draw(weights, self._generator.random())
            position = drawn if positions is None else int(positions[drawn])
        token = int(candidates.ids[position])
        if self._adjusts:
            self._counts[token] = self._counts.get(token, 0) + 1
        return Choice(token, float(candidates.logprobs[position]))

    def _adjusted(self, candidates: Candidates) -> NDArray[np.float32]:
        """Log-probabilities after penalties and bias; a new array."""
        logits = candidates.logprobs.astype(np.float32)
        if self._counts and (self._params.presence_penalty or self._params.frequency_penalty):
            ids = np.fromiter(self._counts.keys(), np.int64, len(self._counts))
            counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            loss = self._params.presence_penalty + self._params.frequency_penalty * counts
            _add(logits, candidates, ids, -loss.astype(np.float32))
        if self._bias_ids.size:
            _add(logits, candidates, self._bias_ids, self._bias)
        return logits


def _add(
    logits: NDArray[np.float32], candidates: Candidates, ids: NDArray[np.int64], amounts: NDArray[np.float32]
) -> None:
    if candidates.complete:
        logits[ids] += amounts
        return
    for token, amount in zip(ids, amounts, strict=True):
        logits[candidates.ids == token] += amount


def _first_best(candidates: Candidates, logits: NDArray[np.float32]) -> int:
    """Index of the highest value; the lowest id among equals."""
    if candidates.complete:
        return int(logits.argmax())
    equals = np.flatnonzero(logits == logits.max())
    return int(equals[candidates.ids[equals].argmin()])


def distribution(
    logits: NDArray[np.float32], params: SamplingParams
) -> tuple[NDArray[np.intp] | None, NDArray[np.float64]]:
    """What to draw from: positions into `logits` (`None`: all of them, in order) and their weights `[m]`.

    Weights are not negative, the largest is 1, and they are in proportion to the probabilities. The
    temperature is at least `GREEDY_BELOW`.
    """
    scaled = logits.astype(np.float64)
    scaled -= scaled.max()
    if params.temperature != 1.0:
        scaled /= params.temperature
    weights = np.exp(scaled, out=scaled)
    positions: NDArray[np.intp] | None = None
    if params.top_k is not None and params.top_k < len(weights):
        positions = _highest(weights, params.top_k)
        weights = weights[positions]
    if params.top_p < 1.0:
        kept = _nucleus(weights, params.top_p)
        positions = kept if positions is None else positions[kept]
        weights = weights[kept]
    if params.min_p > 0.0:
        kept = np.flatnonzero(weights >= params.min_p * weights.max())
        positions = kept if positions is None else positions[kept]
        weights = weights[kept]
    return positions, weights


def draw(weights: NDArray[np.float64], uniform: float) -> int:
    """The index that `uniform`, in [0, 1), picks from unnormalised weights."""
    cumulative = weights.cumsum()
    index = int(cumulative.searchsorted(uniform * cumulative[-1], side="right"))
    return min(index, len(weights) - 1)


def _highest(weights: NDArray[np.float64], count: int) -> NDArray[np.intp]:
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
        order = _highest(weights, count)
        cumulative = weights[order].cumsum()
        if cumulative[-1] >= target or count == len(weights):
            return order[: int(cumulative.searchsorted(target, side="left")) + 1]
        count = min(count * 8, len(weights))


def top_logprobs(candidates: Candidates, count: int) -> list[tuple[int, float]]:
    """The `count` most probable tokens with their log-probabilities, highest first."""
    if count == 0:
        return []
    ids, logprobs = candidates.ids, candidates.logprobs
    if candidates.complete:
        chosen = _highest(logprobs.astype(np.float64), count)
        ids, logprobs = ids[chosen], logprobs[chosen]
    return [(int(token), float(value)) for token, value in zip(ids[:count], logprobs[:count], strict=True)]

"""From a model's distribution to an answer's next token, as a request wants it.

Presence and frequency penalties (over generated tokens, as OpenAI defines them and vLLM does) and logit bias come
first; the rest is `policy/sampling.py`'s, which devices follow as well.

A stage's head sends its top 64 tokens unless `needs_full_vocabulary` says otherwise. At temperature 1 and below this
is a top-64 cut in front of the others (llama.cpp cuts at 40 by default), and probabilities are relative to what is
left. Reported log-probabilities are the model's own, before penalties, bias and temperature.

Pure but for the tokens that were counted: one draw a token.
"""

import msgspec
import numpy as np
from numpy.typing import NDArray

from fallow.domain.sampling import Recipe
from fallow.gateway.contract import Candidates
from fallow.policy.sampling import SEED_BITS, choose, highest

HEAD_TOP_K = 64
"""How many candidates a head sends unless it is asked for all."""


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


def adjusts(params: SamplingParams) -> bool:
    """Whether choices depend on more than the distribution and the draw."""
    return bool(params.logit_bias or params.presence_penalty or params.frequency_penalty)


def needs_full_vocabulary(params: SamplingParams) -> bool:
    """Whether the top 64 could leave out a token that ought to have a chance.

    Penalties and biases can lift a token from below the cut. A temperature above 1 gives the tail weight, unless
    top_k cuts it off anyway.
    """
    return adjusts(params) or (
        params.temperature > 1.0 and not (params.top_k is not None and params.top_k <= HEAD_TOP_K)
    )


class Sampler:
    """Chooses the tokens of one choice. `index` tells the choices of one seeded request apart."""

    def __init__(self, params: SamplingParams, seed: int, index: int = 0) -> None:
        self._params = params
        self.recipe = Recipe(
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            min_p=params.min_p,
            seed=seed & SEED_BITS,
            index=index,
        )
        self._adjusts = adjusts(params)
        self._chosen = 0
        self._counts: dict[int, int] = {}
        self._bias_ids = np.fromiter(params.logit_bias.keys(), np.int64, len(params.logit_bias))
        self._bias = np.fromiter(params.logit_bias.values(), np.float32, len(params.logit_bias))

    def choose(self, candidates: Candidates) -> Choice:
        """The next token. `candidates` holds at least one entry, highest first or the whole vocabulary."""
        logits = self._adjusted(candidates) if self._adjusts else candidates.logprobs
        position = choose(candidates.ids, logits, self.recipe, self._chosen, complete=candidates.complete)
        self._chosen += 1
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


def top_logprobs(candidates: Candidates, count: int) -> list[tuple[int, float]]:
    """The `count` most probable tokens with their log-probabilities, highest first."""
    if count == 0:
        return []
    ids, logprobs = candidates.ids, candidates.logprobs
    if candidates.complete:
        chosen = highest(logprobs.astype(np.float64), count)
        ids, logprobs = ids[chosen], logprobs[chosen]
    return [(int(token), float(value)) for token, value in zip(ids[:count], logprobs[:count], strict=True)]

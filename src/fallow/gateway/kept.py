"""Finished conversations whose caches are still on their devices, for a follow-up turn.

Rules
- They are bounded in number and age, and only their own key may reuse one.
- The one with the longest common prefix serves a follow-up turn, if it spares enough.
- Room on devices goes to live conversations: the oldest kept ones go first.
"""

from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from fallow.domain.clock import Clock
from fallow.domain.ids import Digest
from fallow.gateway.chain import Chain
from fallow.policy.prefix import common_prefix

KEPT_CHAINS_MAX = 64
KEPT_CHAIN_AGE_S = 300.0
REUSE_TOKENS_MIN = 16
"""Shorter common prefixes are not worth a kept chain."""


class _Kept(msgspec.Struct):
    chain: Chain
    owner: str
    since_s: float


class KeptChains:
    """Of one gateway."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._kept: deque[_Kept] = deque()

    def keep(self, chain: Chain, owner: str) -> None:
        """A conversation has ended, and its cache may serve the next turn."""
        self._kept.append(_Kept(chain, owner, self._clock.monotonic_s()))
        while len(self._kept) > KEPT_CHAINS_MAX:
            self._free_oldest()

    def take(self, model: Digest, prompt: Sequence[int], owner: str) -> tuple[Chain, int] | None:
        """The chain that spares the most of a prompt, and how many tokens; it is not kept any more."""
        candidates = [k for k in self._kept if k.owner == owner and k.chain.model == model and not k.chain.broken]
        # The last prompt token is always computed anew: its logits are wanted.
        shared = {id(k): min(common_prefix(k.chain.tokens, prompt), len(prompt) - 1) for k in candidates}
        best = max(candidates, key=lambda k: shared[id(k)], default=None)
        if best is None or shared[id(best)] < REUSE_TOKENS_MIN:
            return None
        self._kept.remove(best)
        return best.chain, shared[id(best)]

    def make_room(self, tokens: int) -> bool:
        """Let chains go, oldest first, until they had reserved so much together. Whether any went."""
        freed_tokens = 0
        while freed_tokens < tokens and self._kept:
            freed_tokens += self._kept[0].chain.reserve_tokens
            self._free_oldest()
        return freed_tokens > 0

    def chains(self) -> tuple[Chain, ...]:
        """All of them, oldest first."""
        return tuple(kept.chain for kept in self._kept)

    def forget(self, gone: Callable[[Chain], bool]) -> None:
        """Free those whose caches are gone in part."""
        for kept in [kept for kept in self._kept if gone(kept.chain)]:
            self._kept.remove(kept)
            kept.chain.close()

    def expire(self) -> None:
        """Free those that are too old."""
        now_s = self._clock.monotonic_s()
        while self._kept and now_s - self._kept[0].since_s > KEPT_CHAIN_AGE_S:
            self._free_oldest()

    def close(self) -> None:
        """Free all."""
        while self._kept:
            self._free_oldest()

    def _free_oldest(self) -> None:
        self._kept.popleft().chain.close()

"""The seams of a gateway: `TokenSource` between the API and the fleet, `Router` between sessions and coordinators.

The API side owns text, templates, sampling and HTTP. The session side owns routes, stages, failures and prefix
reuse. What passes between them is tokens in, log-probabilities out; a failure that was repaired is invisible here.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from fallow.domain.errors import (
    BusTimeout,
    BusUnavailable,
    GrantRefused,
    KvExhausted,
    NoRoute,
    NotWorking,
    StageRefused,
)
from fallow.domain.fleet import Hop
from fallow.domain.ids import Digest, NodeId, SessionId
from fallow.domain.model import Manifest
from fallow.domain.sampling import Recipe
from fallow.domain.service import ServiceTier

Meanwhile = Callable[[], Awaitable[None]]
"""What is done while devices compute."""


class Candidates(msgspec.Struct, frozen=True):
    """One position's next-token distribution, highest first.

    `ids` int32 `[k]`, `logprobs` float32 `[k]`; with `top_k=None`, the whole vocabulary in id order.
    """

    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    complete: bool
    """Whether these are the whole vocabulary (in id order) rather than the top of it."""


NOT_NOW: Final = (NoRoute, KvExhausted, StageRefused, BusTimeout, BusUnavailable, NotWorking, GrantRefused)
"""Why a chain cannot be had, or opened, at this moment; a moment later may be another. A coordinator that has just come
to lead and does not know its lease yet says `NotWorking`."""


class Router(Protocol):
    """Where chains come from: the coordinator, over the bus."""

    async def route(
        self, model: Digest, session: SessionId, reserve_tokens: int, exclude: frozenset[NodeId], keep: Sequence[Hop],
        rebuild_tokens: int, spare: bool = False,
    ) -> tuple[Hop, ...]:  # fmt: skip
        """A chain that covers the model. `rebuild_tokens`: how many its newcomers must compute before the next one.
        `spare`: as in `RouteRequest`.

        Raises `NoRoute`, also for an answer that cannot be read or is not signed; `KvExhausted`, `BusTimeout`,
        `BusUnavailable`; `NotWorking` when this gateway or the coordinator may not work; `GrantRefused` when the
        coordinator gives no grant.
        """
        ...


class Conversation(Protocol):
    """One generation in progress: a session on some chain of devices. Not shared between tasks."""

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were served from a kept session's cache."""
        ...

    async def prefill(self) -> Candidates:
        """Push the prompt through; the distribution after its last token."""
        ...

    async def decode(self, token: int, meanwhile: Meanwhile | None = None) -> Candidates:
        """Append a token; the distribution after it. `meanwhile` is done while the devices compute; what it raises
        ends the generation."""
        ...

    async def close(self, *, keep: bool) -> None:
        """End it. `keep` leaves the cache on the devices for a follow-up turn; otherwise it is freed everywhere.
        Idempotent."""
        ...


class TokenSource(Protocol):
    """Opens conversations on the fleet."""

    def models(self) -> Sequence[Manifest]:
        """Models that can be asked for now."""
        ...

    def tier(self, wanted: ServiceTier) -> ServiceTier:
        """What answers are given of the tier that is asked for."""
        ...

    async def open(
        self,
        model: Digest,
        prompt: Sequence[int],
        max_new_tokens: int,
        top_k: int | None,
        owner: str,
        recipe: Recipe | None = None,
        tier: ServiceTier = ServiceTier.DEFAULT,
    ) -> Conversation:
        """Find a chain and reserve room. `owner` (an API key's id) scopes prefix reuse: no cache is shared across keys.
        `recipe`: how every token is going to be chosen, when that can be told; devices then run ahead. `tier`: what is
        done for it beyond that.

        Raises `UnknownModel`, `NoRoute`, `KvExhausted`, `ContextExceeded`.
        """
        ...

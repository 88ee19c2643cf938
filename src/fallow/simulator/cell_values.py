"""What `cell_model.py` is made of and what it tells: devices, sessions asked for, the router under test, figures."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import msgspec

from fallow.domain.fleet import Outlook, RouteReply, RouteRequest, Speed
from fallow.domain.ids import Digest, NodeId
from fallow.domain.model import Span
from fallow.policy.routing import Carrier

MODEL = Digest("ab" * 32)


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """A device of the model."""

    speed: Speed
    pieces: tuple[Span, ...]
    kv_bytes: int
    outlook: Outlook | None = None


class Asked(NamedTuple):
    """A session that a client asks for."""

    gateway: int
    tokens: int


class Route(Protocol):
    """The router under test."""

    def __call__(self, request: RouteRequest, carriers: Mapping[NodeId, Carrier], now_s: float) -> RouteReply:
        """A chain, or why there is none."""
        ...


class Seen(msgspec.Struct, kw_only=True):
    """What the model recorded since `reset`."""

    from_s: float
    until_s: float = 0.0
    tokens: int = 0
    hops: int = 0
    """Hops of the chains that tokens went through."""
    token_s: list[float] = []
    session_token_s: list[float] = []
    """For each session that ended, its mean seconds a token."""
    started: int = 0
    finished: int = 0
    refused: int = 0
    repairs: int = 0
    stalls_s: list[float] = []

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / max(self.until_s - self.from_s, 1e-9)

    @property
    def hops_mean(self) -> float:
        return self.hops / max(self.tokens, 1)

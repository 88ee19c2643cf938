"""Carriers of drawn cells, for tests of routing."""

import random

from hypothesis import strategies as st

from fallow.domain.fleet import Outlook, RouteReply, RouteRequest, Speed
from fallow.domain.frames import PeerAddress
from fallow.domain.ids import Digest, NodeId, SessionId
from fallow.domain.model import Span, StageSpec
from fallow.policy.routing import Carrier, ModelShape, kv_bytes

MODEL = Digest("ab" * 32)
SHAPE = ModelShape(layer_count=12, kv_bytes_per_token_layer=1, head_layers=2.0)
PARTS = tuple(Span(first, first + 2) for first in range(0, 12, 2))
WORK = [1.0] * 11 + [3.0]


def node_id(index: int) -> NodeId:
    return NodeId(f"{index:064x}")


def carrier(
    index: int,
    first: int,
    last: int,
    seconds: float = 0.001,
    sessions: int = 0,
    kv_free: int = 10**6,
    tokens_per_s: float = 0.0,
    survival: tuple[float, ...] = (),
) -> Carrier:
    """One that holds parts `first` to `last`."""
    return Carrier(
        address=PeerAddress(node_id(index), ()),
        stage=StageSpec(model=MODEL, pieces=PARTS[first:last]),
        speed=Speed(layer_s_1=seconds, layer_s_4=1.7 * seconds, layer_s_8=2.6 * seconds),
        sessions=sessions,
        kv_free_bytes=kv_free,
        tokens_per_s=tokens_per_s,
        outlook=Outlook(survival=survival, expected_s=3600.0) if survival else None,
    )


def request(session: int = 0, exclude: tuple[NodeId, ...] = (), tokens: int = 10) -> RouteRequest:
    return RouteRequest(
        model=MODEL, session=SessionId(f"{session:032x}"), reserve_tokens=tokens, exclude=exclude, origin=None
    )


@st.composite
def cells(draw: st.DrawFn, least: int = 9, most: int = 30) -> dict[NodeId, Carrier]:
    """Carriers with one contiguous span each; not every cell covers the model."""
    seed = draw(st.integers(0, 2**32 - 1))
    count = draw(st.integers(least, most))
    width = draw(st.integers(1, 6))
    full = draw(st.sampled_from([0.0, 0.2, 0.8]))
    dice = random.Random(seed)
    found: dict[NodeId, Carrier] = {}
    for index in range(count):
        first = dice.randrange(len(PARTS))
        found[node_id(index)] = carrier(
            index,
            first,
            min(first + dice.randint(1, width), len(PARTS)),
            seconds=dice.choice([0.001, 0.002, 0.01]),
            sessions=dice.randrange(20),
            kv_free=dice.randrange(60) if dice.random() < full else 10**6,
            tokens_per_s=dice.choice([0.0, 5.0, 50.0]),
            survival=dice.choice([(), (0.9, 0.8, 0.6, 0.2, 0.0), (0.0,) * 5]),
        )
    return found


def check_lawful(reply: RouteReply, carriers: dict[NodeId, Carrier], asked: RouteRequest) -> None:
    """Each layer once, in order; no carrier twice; held, roomy and not excluded."""
    assert [layer for hop in reply.hops for layer in range(hop.span.first, hop.span.last)] == list(range(12))
    nodes = [hop.address.node for hop in reply.hops]
    assert len(set(nodes)) == len(nodes)
    assert not set(nodes) & set(asked.exclude)
    for hop in reply.hops:
        item = carriers[hop.address.node]
        assert item.stage.pieces_of(hop.span)
        assert kv_bytes(hop.span, asked.reserve_tokens, SHAPE) <= item.kv_free_bytes

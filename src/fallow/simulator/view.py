"""What invariants look at: plain values of the world's state at one moment.

It counts anew from the parts' own books wherever it can, so that a part that counts wrongly is seen. For that it reads
their private state, which nobody else may do.
"""

from collections.abc import Iterable

import msgspec

from fallow.domain.frames import Rows
from fallow.domain.ids import NodeId, SessionId
from fallow.node.agent import Agent
from fallow.simulator.devices import SimulatedDevice
from fallow.simulator.engine_model import SimulatedEngine
from fallow.simulator.gateways import SimulatedGateway


class StageView(msgspec.Struct, frozen=True, kw_only=True):
    """A session on a device."""

    session: SessionId
    gateway: NodeId
    waiting_rows: int
    waiting_bytes: int
    rows_ahead: int = 0
    """Computed beyond what the gateway has sent; of first stages."""


class NodeView(msgspec.Struct, frozen=True, kw_only=True):
    """A device."""

    name: str
    gone: bool
    """Nothing may be computed here."""
    memory_bytes: int
    weights_bytes: int
    kv_budget_bytes: int
    kv_reserved_bytes: int
    log_budget_bytes: int
    log_bytes: int
    log_bytes_booked: int
    """What the device believes that its logs take."""
    rows_computed: int
    rows_when_gone: int
    engine_sessions: int
    engine_waiting: int
    bus_waiting: int
    stages: tuple[StageView, ...]


class CoordinatorView(msgspec.Struct, frozen=True):
    """A coordinator process that lives."""

    name: str
    epoch: int | None
    """Under which it leads."""


def node_view(device: SimulatedDevice, bus_waiting: int) -> NodeView | None:
    """A device now; `None` when it never ran."""
    engine, agent = device.engine, device.agent
    if engine is None:
        return None
    stages = () if agent is None else tuple(_stages(agent))
    return NodeView(
        name=device.figures.name,
        gone=device.gone_s is not None,
        memory_bytes=device.figures.memory_bytes,
        weights_bytes=engine.hosted_weights_bytes(),
        kv_budget_bytes=engine.kv_budget_bytes,
        kv_reserved_bytes=engine.kv_reserved_bytes(),
        log_budget_bytes=device.log_budget_bytes,
        log_bytes=0 if agent is None else _log_bytes(agent),
        log_bytes_booked=0 if agent is None else agent.relay.log_bytes,
        rows_computed=engine.rows_computed,
        rows_when_gone=device.rows_when_gone,
        engine_sessions=_engine_sessions(engine),
        engine_waiting=engine.waiting,
        bus_waiting=bus_waiting,
        stages=stages,
    )


def _stages(agent: Agent) -> Iterable[StageView]:
    for session in agent.relay._sessions.values():
        queues = (session._present, session._early)
        yield StageView(
            session=session.id,
            gateway=session.gateway,
            waiting_rows=sum(item.header.count for queue in queues for item in queue._items),
            waiting_bytes=sum(len(item.payload) for queue in queues for item in queue._items),
            rows_ahead=session.told.beyond(session.position) if session.flow and session.flow.ahead_from else 0,
        )


def feeds_nobody(device: SimulatedDevice | None, sender: NodeId, rows: Rows) -> bool:
    """Whether rows that came to a device are a last stage's word to the first one, which the gateway's own rows repeat,
    or came when their session had ended there."""
    held = None if device is None or device.agent is None else device.agent.relay._sessions.get(rows.session)
    return held is None or (held.span.first == 0 and sender != held.gateway)


def _log_bytes(agent: Agent) -> int:
    return sum(session.log.size_bytes for session in agent.relay._sessions.values())


def _engine_sessions(engine: SimulatedEngine) -> int:
    return len(engine._sessions)


def sessions_of(gateway: SimulatedGateway) -> dict[SessionId, frozenset[NodeId]]:
    """The sessions that a gateway has, running or kept, by their names on devices, and the devices that hold them."""
    source = gateway.source
    found: dict[SessionId, set[NodeId]] = {}
    for chain in [*source._live.values(), *source._kept.chains()]:
        for node, session in chain.stages():
            found.setdefault(session, set()).add(node)
    return {session: frozenset(nodes) for session, nodes in found.items()}

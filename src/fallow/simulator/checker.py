"""Holds a running world to its invariants: watches what is delivered, and looks at what it touched.

Rules
- Each delivered frame of a session is checked for its way; each order, for what it asks; each answer, when it ends.
- A device is looked at in the next `LOOK_S` after anything reached it; everybody is looked at every `SWEEP_S`. Leaders
  are looked at every `LOOK_S` and at each order.
- A violation is noted once for each invariant and subject, and `VIOLATIONS_MAX` in all.
"""

from typing import Final

import msgspec

from fallow.domain.fleet import NodeCommand, PlaceStage
from fallow.domain.frames import CloseSession, Frame, OpenStage, Result, Rows
from fallow.domain.ids import NodeId, SessionId
from fallow.fabric.memory_bus import Message
from fallow.simulator import invariants
from fallow.simulator.devices import SimulatedDevice
from fallow.simulator.engine_model import weights_bytes
from fallow.simulator.gateways import SimulatedGateway, Turn
from fallow.simulator.results import Violation
from fallow.simulator.view import CoordinatorView, feeds_nobody, node_view, sessions_of
from fallow.simulator.world import World

LOOK_S: Final = 0.1
SWEEP_S: Final = 5.0
VIOLATIONS_MAX: Final = 100
ENDS_MAX: Final = 200_000
"""Positions that are remembered; beyond that the oldest go."""

_ORDER: msgspec.json.Decoder[NodeCommand] = msgspec.json.Decoder(NodeCommand)


class Checker:
    """One run's watch."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._touched: dict[NodeId, None] = {}
        self._paths = invariants.Paths()
        self._ends: dict[tuple[SessionId, int, NodeId], int] = {}
        self._unknown_since_s: dict[tuple[NodeId, SessionId], float] = {}
        self._seen: set[tuple[str, str]] = set()
        self.violations: list[Violation] = []
        world.watchers.append(self._on_frame)
        world.bus_watchers.append(self._on_bus)
        world.turn_watchers.append(self._on_turn)
        world.spawn(self._look())

    # --- what is delivered ------------------------------------------------------------------------

    def _on_frame(self, sender: NodeId, receiver: NodeId, frame: Frame) -> None:
        header = frame.header
        if isinstance(header, Rows) and feeds_nobody(self._world.by_id.get(receiver), sender, header):
            pass
        elif isinstance(header, Rows | Result):
            self._note(
                invariants.one_chain_serves,
                header.session,
                invariants.one_chain_serves(self._paths, sender, receiver, header.session, header.epoch),
            )
            if isinstance(header, Rows):
                found = invariants.positions_rise(self._ends, receiver, header)
                self._note(invariants.positions_rise, header.session, found)
                if len(self._ends) > ENDS_MAX:
                    del self._ends[next(iter(self._ends))]
        elif isinstance(header, OpenStage | CloseSession):
            # A device that leaves a chain and is opened anew in the same epoch begins at 0 again.
            self._ends.pop((header.session, getattr(header, "epoch", -1), receiver), None)
        self._touched[sender] = None
        self._touched[receiver] = None

    def _on_bus(self, _: str, receiver: str, message: Message) -> None:
        if not message.subject.endswith(".command"):
            return
        self._look_for_leaders()
        device = self._world.by_id.get(NodeId(receiver))
        order = _ORDER.decode(message.message)
        if device is None or not isinstance(order, PlaceStage):
            return
        weights = weights_bytes(order.stage, self._world.scenario.model)
        found = invariants.placement_fits(
            device.figures.name, weights, device.figures.memory_bytes, device.kv_budget_bytes
        )
        self._note(invariants.placement_fits, device.id, found)

    def _on_turn(self, _: SimulatedGateway, turn: Turn) -> None:
        if turn.ended_s is None:
            return
        self._note(invariants.answers_are_unaltered, str(turn.number), invariants.answers_are_unaltered(turn))
        if turn.session is not None:
            self._paths.forget(turn.session)

    # --- what is looked at ------------------------------------------------------------------------

    async def _look(self) -> None:
        next_sweep_s = 0.0
        while True:
            await self._world.clock.sleep(LOOK_S)
            self._look_for_leaders()
            touched, self._touched = self._touched, {}
            for node in touched:
                device = self._world.by_id.get(node)
                if device is not None:
                    self.look_at(device)
            if self._world.clock.monotonic_s() >= next_sweep_s:
                next_sweep_s = self._world.clock.monotonic_s() + SWEEP_S
                self.sweep()

    def look_at(self, device: SimulatedDevice) -> None:
        """Check one device now."""
        view = node_view(device, self._world.network.hub.waiting_for(device.id))
        if view is not None:
            for invariant in invariants.NODE_INVARIANTS:
                self._note(invariant, device.id, invariant(view))

    def sweep(self) -> None:
        """Check everybody, and what takes time to go wrong."""
        now_s = self._world.clock.monotonic_s()
        for device in self._world.devices:
            self.look_at(device)
        for cell in self._world.cells:
            for gateway in cell.gateways:
                for turn in gateway.turns.values():
                    found = invariants.sessions_make_progress(turn, now_s)
                    self._note(invariants.sessions_make_progress, str(turn.number), found)
        self._look_for_leftovers(now_s)

    def _look_for_leaders(self) -> None:
        for cell in self._world.cells:
            views = [CoordinatorView(each.name, each.epoch()) for each in cell.coordinators if each.process is not None]
            self._note(invariants.one_leads, cell.name, invariants.one_leads(views))

    def _look_for_leftovers(self, now_s: float) -> None:
        known = {
            (node, session)
            for cell in self._world.cells
            for gateway in cell.gateways
            for session, nodes in sessions_of(gateway).items()
            for node in nodes
        }
        self._paths.keep({session for _, session in known})
        unknown: dict[tuple[NodeId, SessionId], float] = {}
        for device in self._world.devices:
            view = None if device.gone_s is not None else node_view(device, 0)
            for stage in () if view is None else view.stages:
                key = (device.id, stage.session)
                if key in known:
                    continue
                unknown[key] = self._unknown_since_s.get(key, now_s)
                found = invariants.nothing_outlives_its_session(
                    device.figures.name, stage.session, now_s - unknown[key]
                )
                self._note(invariants.nothing_outlives_its_session, device.id + stage.session, found)
        self._unknown_since_s = unknown

    # --- what is found ----------------------------------------------------------------------------

    def _note(self, invariant: object, subject: str, found: str | None) -> None:
        if found is None:
            return
        name = getattr(invariant, "__name__", str(invariant))
        if (name, subject) in self._seen or len(self.violations) >= VIOLATIONS_MAX:
            return
        self._seen.add((name, subject))
        self.violations.append(Violation(invariant=name, at_s=self._world.now_s(), detail=found))
        self._world.note(f"violation {name} {found}")

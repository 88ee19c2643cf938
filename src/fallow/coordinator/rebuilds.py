"""Rebuilds that were given out a moment ago: how long each device, or its line, will be at them.

A loss breaks many answers at once, and each is routed a few milliseconds after the last. Heartbeats tell too late what
the last ones brought; so what a repair will take counts from the moment that its chain is given out, and passes with
time. It is an estimate, and nothing depends on it but the choice of chains for repairs.
"""

from collections.abc import Iterable, Mapping
from typing import Final

import msgspec

from fallow.domain.fleet import Hop, RouteRequest
from fallow.domain.ids import NodeId
from fallow.policy.rebuild import busy_share
from fallow.policy.routing import Carrier, ModelShape, RoutingRules, rebuild_s
from fallow.policy.speed import layer_s

BUSY_MAX_S: Final = 60.0
"""Nobody is thought to be busy for longer: a device that is much slower than it seemed is not avoided for ever."""

PROMPT_SHARE: Final = 0.5
LAYER_UNKNOWN_S: Final = 0.001


class PromisedRebuilds:
    """When each device will have done what it was given. At most one entry a device of the fleet."""

    def __init__(self) -> None:
        self._until_s: dict[NodeId, float] = {}

    def note(
        self, request: RouteRequest, hops: tuple[Hop, ...], shape: ModelShape, carriers: Mapping[NodeId, Carrier],
        rules: RoutingRules, now_s: float,
    ) -> None:  # fmt: skip
        """A repair was given this chain. `carriers`: as `loaded` gave them for it."""
        self._until_s = {node: until_s for node, until_s in self._until_s.items() if until_s > now_s}
        kept = {(hop.address.node, hop.span) for hop in request.keep}
        for hop, following in zip(hops, (*hops[1:], None), strict=True):
            node, carrier = hop.address.node, carriers.get(hop.address.node)
            if (node, hop.span) not in kept and carrier is not None:
                carrier = msgspec.structs.replace(carrier, rebuild_wait_s=0.0)
                self._add(node, rebuild_s(carrier, hop.span, request.rebuild_tokens, shape, rules), now_s)
            elif following is not None and (following.address.node, following.span) not in kept:
                self._add(node, request.rebuild_tokens * shape.send_row_s, now_s)

    def note_prompt(
        self, request: RouteRequest, hops: tuple[Hop, ...], shape: ModelShape, carriers: Mapping[NodeId, Carrier],
        rules: RoutingRules, now_s: float,
    ) -> None:  # fmt: skip
        """A new session was given this chain; its prompt is thought to be `PROMPT_SHARE` of what it reserves."""
        tokens = round(request.reserve_tokens * PROMPT_SHARE)
        for hop in hops:
            carrier = carriers.get(hop.address.node)
            if carrier is not None:
                self._add(hop.address.node, rebuild_s(carrier, hop.span, tokens, shape, rules), now_s)

    def _add(self, node: NodeId, takes_s: float, now_s: float) -> None:
        until_s = max(now_s, self._until_s.get(node, now_s)) + takes_s
        self._until_s[node] = min(until_s, now_s + BUSY_MAX_S)

    def loaded(self, carriers: Iterable[Carrier], visits: Mapping[NodeId, float], now_s: float) -> list[Carrier]:
        """The carriers with what they compute already, and how long they will be at what they were given.

        `visits`: how many layers a row is computed through, by device."""
        return [
            msgspec.structs.replace(
                carrier,
                busy_share=busy_share(
                    carrier.tokens_per_s,
                    visits.get(carrier.node, carrier.stage.layer_count),
                    layer_s(carrier.speed, 1, LAYER_UNKNOWN_S),
                ),
                rebuild_wait_s=max(0.0, self._until_s.get(carrier.node, now_s) - now_s),
            )
            for carrier in carriers
        ]

    def forget(self, node: NodeId) -> None:
        """It is gone."""
        self._until_s.pop(node, None)

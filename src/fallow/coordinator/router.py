"""Chains for sessions: keeps each model's weights fresh, remembers what was promised, and asks the policies.

Rules
- Weights are worked out every `RoutingRules.refresh_s` for models that have more than `exact_carriers_max` carriers.
- A new session of such a model gets the best of a few drawn chains (`policy/routing_choice.py`), by draws seeded with
  the session: equal states give equal chains. Where no drawn chain has room, the best carriers of every edge are
  looked at. A repair, a small cell and one not weighed yet are searched exactly (`policy/routing.py`).
- A chain that stands by for another gets idle devices (`policy/spares.py`), or none.
- A chain that was given out counts against its carriers until their heartbeats show it, and a repair for as long as it
  is thought to take (`rebuilds.py`).

It does no I/O and reads no clock.
"""

import random
from collections.abc import Mapping
from typing import NamedTuple

from fallow.coordinator.rebuilds import PromisedRebuilds
from fallow.coordinator.recent import RecentRoutes
from fallow.domain.fleet import Hop, RouteReply, RouteRequest
from fallow.domain.ids import Digest, NodeId
from fallow.policy.routing import Carrier, ModelShape, RoutingRules, refusal, route
from fallow.policy.routing_choice import choose, choose_widely
from fallow.policy.routing_weights import Weights, weigh
from fallow.policy.spares import apart

SETTLE_MAX_S = 3.0
"""A session that has not opened its stages so long after its route has failed to."""
VISIT_SHARE = 0.1
"""What a new visit counts in the moving mean."""
REFUSAL_VALID_S = 0.25
"""How long sessions that are no smaller than a refused one, and draw no chain, are refused without another look: a
crowd that finds the cell full must not keep its coordinator busy."""


class _Refused(NamedTuple):
    reply: RouteReply
    reserve_tokens: int
    at_s: float

    def stands(self, request: RouteRequest, now_s: float) -> bool:
        return request.reserve_tokens >= self.reserve_tokens and now_s - self.at_s < REFUSAL_VALID_S


class Router:
    """Soft state only: after a restart the weights come with the first heartbeats, and promises are forgotten."""

    def __init__(self, rules: RoutingRules, heartbeat_interval_s: float) -> None:
        self._rules = rules
        self._recent = RecentRoutes(min(heartbeat_interval_s, SETTLE_MAX_S))
        self._rebuilds = PromisedRebuilds()
        self._weights: dict[Digest, Weights] = {}
        self._refused: dict[Digest, _Refused] = {}
        self._visits: dict[Digest, dict[NodeId, float]] = {}
        """Layers of work of a visit, by model and node: a moving mean of what was given out."""

    # --- facts ----------------------------------------------------------------------------------

    def settle(self, node: NodeId, now_s: float) -> None:
        """A heartbeat of `node` came."""
        self._recent.settle(node, now_s)

    def forget(self, node: NodeId) -> None:
        """`node` is gone."""
        self._recent.forget(node)
        self._rebuilds.forget(node)

    def refresh(self, models: Mapping[Digest, tuple[ModelShape, Mapping[NodeId, Carrier]]]) -> None:
        """Weigh every model that has many carriers; forget the others. 10 to 40 ms a model."""
        found: dict[Digest, Weights] = {}
        for model, (shape, carriers) in models.items():
            visits = {node: layers for node, layers in list(self._visits.get(model, {}).items()) if node in carriers}
            self._visits[model] = dict(visits)  # routes go on noting while this runs in a thread
            if len(carriers) > self._rules.exact_carriers_max:
                weights = weigh(shape, tuple(carriers.values()), self._rules, visits)
                if weights is not None:
                    found[model] = weights
        self._weights = found
        self._refused.clear()
        self._visits = {model: visits for model, visits in list(self._visits.items()) if model in models}

    def weights(self, model: Digest) -> Weights | None:
        """The weights in use, for those who report on them."""
        return self._weights.get(model)

    # --- the question ---------------------------------------------------------------------------

    def route(
        self, request: RouteRequest, shape: ModelShape, carriers: Mapping[NodeId, Carrier], now_s: float
    ) -> RouteReply:
        """A chain for a session by what is known now, or why there is none."""
        if not request.spare:
            return self._route(request, shape, carriers, now_s)
        loaded = self._rebuilds.loaded(carriers.values(), self._visits.get(request.model, {}), now_s)
        for among in apart(loaded, frozenset(request.exclude)):
            reply = self._route(request, shape, {carrier.node: carrier for carrier in among}, now_s)
            if reply.hops:
                break
        return reply

    def _route(
        self, request: RouteRequest, shape: ModelShape, carriers: Mapping[NodeId, Carrier], now_s: float
    ) -> RouteReply:
        weights = self._weights.get(request.model)
        if weights is None or request.keep or request.rebuild_tokens or len(carriers) <= self._rules.exact_carriers_max:
            loaded = self._loaded(request, carriers, now_s)
            reply = route(request, shape, loaded, self._rules)
            if request.rebuild_tokens and reply.hops:
                by_node = {carrier.node: carrier for carrier in loaded}
                self._rebuilds.note(request, reply.hops, shape, by_node, self._rules, now_s)
        else:
            reply = self._drawn(request, shape, carriers, weights, now_s)
        if reply.hops:
            if not request.rebuild_tokens and not request.keep:  # who keeps devices, and rebuilds nothing, only renews
                self._rebuilds.note_prompt(request, reply.hops, shape, carriers, self._rules, now_s)
            self._recent.add(request, reply.hops, shape, now_s)
            self._note_visits(request.model, reply.hops, shape)
        return reply

    def _loaded(self, request: RouteRequest, carriers: Mapping[NodeId, Carrier], now_s: float) -> list[Carrier]:
        loaded = self._recent.loaded(tuple(carriers.values()), request.session)
        if not request.rebuild_tokens:
            return loaded
        return self._rebuilds.loaded(loaded, self._visits.get(request.model, {}), now_s)

    def _drawn(
        self,
        request: RouteRequest,
        shape: ModelShape,
        carriers: Mapping[NodeId, Carrier],
        weights: Weights,
        now_s: float,
    ) -> RouteReply:
        draw = random.Random(f"{request.session}{len(request.exclude)}").random  # noqa: S311 - spreads load
        promised = self._recent.promised(request.session)
        hops = choose(request, shape, carriers, promised, weights, draw, self._rules)
        if hops is not None:
            return RouteReply(hops=hops)
        refused = self._refused.get(request.model)
        if refused is not None and refused.stands(request, now_s):
            return refused.reply
        hops = choose_widely(request, shape, carriers, promised, weights, self._rules)
        if hops is not None:
            return RouteReply(hops=hops)
        reply = refusal(request, shape, self._loaded(request, carriers, now_s), self._rules)
        if not request.exclude:
            self._refused[request.model] = _Refused(reply, request.reserve_tokens, now_s)
        return reply

    def _note_visits(self, model: Digest, hops: tuple[Hop, ...], shape: ModelShape) -> None:
        visits = self._visits.setdefault(model, {})
        for hop in hops:
            layers = hop.span.layer_count + (shape.head_layers if hop.span.last == shape.layer_count else 0.0)
            before = visits.get(hop.address.node, layers)
            visits[hop.address.node] = before + VISIT_SHARE * (layers - before)

"""Which device hosts which pieces of which model. Pure.

Rules, whatever the size of the fleet
- A model that fits one device stays whole on one; spare devices become replicas.
- Every model is covered before any model gets second copies; then every part gets `replicas` holders on different
  devices as far as memory goes. Models go in the catalogue's order.
- Never over a device's memory, KV room or disk; never where residency or trust forbid it; nothing new where it failed.
- What is placed stays, and moves only for a reason that is worth it. Placing a placement changes nothing.
- A model that cannot be covered gets nothing new; the reason is told.

Two ways of working it out, by the number of devices (`PlacementRules.few_nodes`)
- Up to `few_nodes`: `placement_pieces.py`. Memory is tight, every copy counts, and a search for room (augmenting
  paths) finds a place where a greedy rule does not. It deals in pieces of one common grid and its time grows fast.
- More: `placement_spans.py`. Throughput counts. Every device holds one contiguous span on the model's cut points,
  where coverage is thinnest, on array kernels that the fast simulator shares.

A fleet that grows or shrinks over the edge keeps what it has: spans adopt pieces of any grid on the cut points as they
are, and the pieces' grid may be the finest, whose pieces are the spans' parts.

`placement_inputs.py` says what it starts from; `placement_plan.py` turns the difference between what is and what should
be into commands, in an order that never uncovers a layer without need.
"""

from collections.abc import Callable, Sequence

from fallow.policy.placement_inputs import ModelNeed, NodeRoom, Placement, PlacementRules, once_placed
from fallow.policy.placement_pieces import place_pieces
from fallow.policy.placement_spans import place_spans

__all__ = ["Placement", "place"]

SETTLE_ROUNDS_MAX = 6
"""A placement is worked out from its own result until nothing changes, so that the next one changes nothing. Few need
more than two; after the last, pieces still only change for what is worth more, so that no plan undoes another."""


def place(models: Sequence[ModelNeed], nodes: Sequence[NodeRoom], rules: PlacementRules | None = None) -> Placement:
    """The placement to aim for, given what the nodes have now."""
    rules = rules or PlacementRules()
    ordered = sorted(nodes, key=lambda node: node.node)
    if len(ordered) <= rules.few_nodes:
        return _settled(place_pieces, models, ordered, rules)
    placed = place_spans(models, ordered, rules)
    # It settles by itself, but for one thing: room may have been found for a model after it was given up.
    return _settled(place_spans, models, ordered, rules) if placed.unplaceable else placed


def _settled(
    work_out: Callable[[Sequence[ModelNeed], Sequence[NodeRoom], PlacementRules], Placement],
    models: Sequence[ModelNeed],
    nodes: Sequence[NodeRoom],
    rules: PlacementRules,
) -> Placement:
    needs = {need.model: need for need in models}
    result = _without_leftovers(work_out(models, nodes, rules), nodes)
    for _ in range(SETTLE_ROUNDS_MAX):
        hosting = [once_placed(node, result.stages[node.node], needs) for node in nodes]
        settled = _without_leftovers(work_out(models, hosting, rules), nodes)
        if settled == result:
            break
        result = settled
    return result


def _without_leftovers(placement: Placement, nodes: Sequence[NodeRoom]) -> Placement:
    """What an earlier round gave to a model that a later one had to give up is not placed: it would never be used."""
    stages = {
        node.node: tuple(
            stage
            for stage in placement.stages[node.node]
            if stage.model not in placement.unplaceable or any(stage.model == held.model for held in node.hosted)
        )
        for node in nodes
    }
    return Placement(stages=stages, unplaceable=placement.unplaceable)

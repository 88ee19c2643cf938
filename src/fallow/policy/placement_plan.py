"""From what the nodes host to what they should host: which moves to ask for now. Pure.

Rules
- A node whose newest order is what it should host already is left alone, whatever has become of that order.
- Moves that take away no layer's last ready holder go at once, together.
- Moves that would are held back until another device is ready with those layers. Only when nothing is under way that
  they could wait for do they go, one at a time: a gap that cannot be avoided is kept short.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import msgspec

from fallow.domain.ids import Digest, NodeId
from fallow.domain.model import StageSpec


class NodeNow(msgspec.Struct, frozen=True, kw_only=True):
    """A node's side of the placement."""

    node: NodeId
    asked: tuple[StageSpec, ...]
    """The newest orders that it has, one stage for each model; hosted or on the way."""
    ready: tuple[StageSpec, ...]


class Move(msgspec.Struct, frozen=True, kw_only=True):
    """Ask a node to host a stage instead of what it hosts of that model; `None`: to host nothing of it."""

    node: NodeId
    model: Digest
    stage: StageSpec | None


def plan(nodes: Sequence[NodeNow], desired: Mapping[NodeId, tuple[StageSpec, ...]]) -> tuple[Move, ...]:
    """The moves to ask for now. A node that `desired` does not name is left alone, and counted on for nothing."""
    ordered = sorted((node for node in nodes if node.node in desired), key=lambda node: node.node)
    ready = Counter(layer for node in ordered for stage in node.ready for layer in _layers(stage))
    waiting: list[Move] = []
    going: list[Move] = []
    for node in ordered:
        for move in _moves(node, desired[node.node]):
            lost = _ready_layers(node, move.model) - (_layers(move.stage) if move.stage else set())
            if any(ready[layer] <= 1 for layer in lost):
                waiting.append(move)
            else:
                ready.subtract(lost)
                going.append(move)
    under_way = any(set(node.asked) - set(node.ready) for node in ordered)
    return tuple(going) if going or under_way else tuple(waiting[:1])


def _moves(node: NodeNow, desired: Sequence[StageSpec]) -> list[Move]:
    wanted = {stage.model: stage for stage in desired}
    asked = {stage.model: stage for stage in node.asked}
    drops = [Move(node=node.node, model=model, stage=None) for model in asked if model not in wanted]
    places = [
        Move(node=node.node, model=model, stage=stage) for model, stage in wanted.items() if asked.get(model) != stage
    ]
    return drops + places


def _ready_layers(node: NodeNow, model: Digest) -> set[tuple[Digest, int]]:
    return {layer for stage in node.ready if stage.model == model for layer in _layers(stage)}


def _layers(stage: StageSpec) -> set[tuple[Digest, int]]:
    return {(stage.model, layer) for piece in stage.pieces for layer in range(piece.first, piece.last)}

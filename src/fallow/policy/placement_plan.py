"""From what the nodes host to what they should host: which moves to ask for now. Pure.

Rules
- A node whose newest order is what it should host already is left alone, whatever has become of that order.
- Moves that take away no layer's last ready holder go at once, together.
- Moves that would are held back until another device is ready with those layers. Only when nothing is under way that
  they could wait for do they go, one at a time: a gap that cannot be avoided is kept short.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

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
    wishes = [(node, move) for node in ordered for move in _moves(node, desired[node.node])]
    losses = [_ready_layers(node, move.model) - (_layers(move.stage) if move.stage else set()) for node, move in wishes]
    ready = _ready_counts(ordered, {model for lost in losses for model, _ in lost})
    waiting: list[Move] = []
    going: list[Move] = []
    for (_, move), lost in zip(wishes, losses, strict=True):
        if any(ready[layer] <= 1 for layer in lost):
            waiting.append(move)
        else:
            ready.subtract(lost)
            going.append(move)
    if going or not waiting or any(stage not in node.ready for node in ordered for stage in node.asked):
        return tuple(going)
    return tuple(waiting[:1])


def _ready_counts(nodes: Sequence[NodeNow], models: Collection[Digest]) -> Counter[tuple[Digest, int]]:
    """How many nodes are ready with each layer of the models of which somebody is to lose one: mostly of none."""
    stages = [stage for node in nodes for stage in node.ready if stage.model in models] if models else []
    return Counter(layer for stage in stages for layer in _layers(stage))


def _moves(node: NodeNow, desired: Sequence[StageSpec]) -> list[Move]:
    if node.asked == tuple(desired):
        return []
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

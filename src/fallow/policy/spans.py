"""Runs of layers: which are held, and how they read. Pure."""

from collections.abc import Iterable, Sequence

from fallow.domain.model import Span, StageSpec


def covered(layer_count: int, stages: Iterable[StageSpec]) -> list[bool]:
    """For each layer, whether any of the stages holds it."""
    held = [False] * layer_count
    for stage in stages:
        for piece in stage.pieces:
            for layer in range(max(piece.first, 0), min(piece.last, layer_count)):
                held[layer] = True
    return held


def spans_where(flags: Sequence[bool]) -> list[Span]:
    """The runs of layers whose flag is set."""
    runs: list[Span] = []
    for layer, flag in enumerate(flags):
        if not flag:
            continue
        if runs and runs[-1].last == layer:
            runs[-1] = Span(runs[-1].first, layer + 1)
        else:
            runs.append(Span(layer, layer + 1))
    return runs

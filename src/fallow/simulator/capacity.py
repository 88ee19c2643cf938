"""What the devices that are here could serve at most, by what they hold: the yardstick of utilisation.

Pure: speeds and spans in, tokens a second out. The bound is that of `policy/flow.py`, exact for pieces that are ready
with every device computing `BATCH_ROWS` rows in a call.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np

from fallow.domain.ids import Digest
from fallow.policy.flow import throughput_of_sets, throughput_of_spans
from fallow.simulator.devices import SimulatedDevice
from fallow.simulator.engine_model import batch_cost
from fallow.simulator.scenario import SimulatedModel

BATCH_ROWS: Final = 8


def capacity_tokens_per_s(devices: Sequence[SimulatedDevice], model: SimulatedModel, digest: Digest) -> float:
    """Decode rows a second; prompts cost the same rows, in larger calls."""
    edges = {0, model.layer_count}
    held: list[tuple[float, list[tuple[int, int]]]] = []
    for device in devices:
        stage = None if device.engine is None else device.engine.hosted_stage(digest)
        if stage is None or device.engine is None:
            continue
        layer_s = device.engine.layer_s * device.engine.slowdown
        spans = [(span.first, span.last) for span in stage.spans()]
        edges.update(edge for span in spans for edge in span)
        held.append((BATCH_ROWS / batch_cost(BATCH_ROWS) / layer_s, spans))
    if not held:
        return 0.0
    return _flow(held, sorted(edges), model)


def _flow(held: list[tuple[float, list[tuple[int, int]]]], edges: list[int], model: SimulatedModel) -> float:
    place = {edge: index for index, edge in enumerate(edges)}
    weights = np.diff(edges).astype(np.float64)
    weights[-1] += model.head_bytes / model.layer_bytes
    rates = np.array([rate for rate, _ in held])
    if all(len(spans) == 1 for _, spans in held):
        first = np.array([place[spans[0][0]] for _, spans in held])
        last = np.array([place[spans[0][1]] for _, spans in held])
        return float(throughput_of_spans(first, last, rates, weights).rows_per_s)
    parts = np.zeros((len(held), len(weights)), dtype=bool)
    for row, (_, spans) in enumerate(held):
        for start, end in spans:
            parts[row, place[start] : place[end]] = True
    return float(throughput_of_sets(parts, rates, weights).rows_per_s)

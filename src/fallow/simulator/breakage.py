"""What a partition breaks, and the least time in which anybody could mend it. A yardstick for pauses.

The bound: what was lost is rows times layers; each layer can be computed anew only where it is held. In the best case
all devices that are left and hold something of a run of layers work at nothing else, in the largest calls, with no way
between them and no answer to decode; so the slowest run of layers says how long all need together at least (the Hall
condition of the transport problem, for runs of layers, which is what devices hold). Noticing comes before it.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from fallow.engine.contract import PREFILL_CHUNK_ROWS
from fallow.simulator.engine_model import batch_cost
from fallow.simulator.results import Breakage

if TYPE_CHECKING:
    from fallow.simulator.world import World


class Helper(NamedTuple):
    """A device that is left."""

    layers: frozenset[int]
    layer_rows_per_s: float
    """Layers times rows a second, at best."""


def least_mend_s(lost_rows: Sequence[int], helpers: Sequence[Helper]) -> float | None:
    """Seconds until all is computed anew at best. `lost_rows`: by layer. `None`: what nobody holds cannot be."""
    least_s = 0.0
    for first in range(len(lost_rows)):
        work = 0
        run: set[int] = set()
        for layer in range(first, len(lost_rows)):
            work += lost_rows[layer]
            run.add(layer)
            speed = sum(helper.layer_rows_per_s for helper in helpers if not run.isdisjoint(helper.layers))
            if work and not speed:
                return None
            least_s = max(least_s, work / speed if work else 0.0)
    return least_s


def breakage(world: "World", region: str) -> Breakage:
    """What a cut around `region` takes from answers that are being given now. To be asked just before it."""
    there = world.operator_region == region
    lost_rows = [0] * world.scenario.model.layer_count
    answers = 0
    for chain in (chain for cell in world.cells for gateway in cell.gateways for chain in gateway.answering()):
        lost = [
            hop for hop in chain.hops if (world.by_id[hop.address.node].figures.region == region) is not there
        ]  # what is on the other side than the gateways
        answers += bool(lost)
        for hop in lost:
            for layer in range(hop.span.first, hop.span.last):
                lost_rows[layer] += len(chain.tokens)
    helpers = [
        Helper(
            frozenset(layer for piece in stage.pieces for layer in range(piece.first, piece.last)),
            PREFILL_CHUNK_ROWS / batch_cost(PREFILL_CHUNK_ROWS) / (device.engine.layer_s * device.engine.slowdown),
        )
        for device in world.devices
        if device.engine is not None and device.is_here and (device.figures.region == region) is there
        if (stage := device.engine.hosted_stage(world.model.digest)) is not None
    ]
    return Breakage(at_s=world.now_s(), answers=answers, least_mend_s=least_mend_s(lost_rows, helpers))

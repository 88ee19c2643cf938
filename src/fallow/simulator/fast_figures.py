"""Adds up what blocks of cells found and turns it into a result's samples and totals.

Latencies are kept as histograms over logarithmic classes (`CLASSES`), so that those of all cells and steps are told
together; a quantile is exact to the width of a class, 3.5 %.
"""

from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from fallow.simulator.results import Sample, Totals

Floats = npt.NDArray[np.float64]

LEAST_S, MOST_S = 1e-3, 1e3
CLASSES: Final = 400
_WIDTH: Final = np.log(MOST_S / LEAST_S) / CLASSES


class Tally(msgspec.Struct, frozen=True, kw_only=True):
    """One block's figures, [bins] each, or [bins, CLASSES]. Filled in place."""

    device_s: Floats
    """Devices at hand, times seconds."""
    capacity: Floats
    """Tokens that could have been served."""
    offered: Floats
    served: Floats
    started: Floats
    begun: Floats
    refused: Floats
    failed: Floats
    hops: Floats
    """Times sessions."""
    orders: Floats
    repairs: Floats
    file_bytes: Floats
    first: Floats
    gaps: Floats
    stalls: Floats
    steps: Floats
    """[1] what was counted as an event."""


def empty(bins: int) -> Tally:
    """Nothing yet."""
    wide = ("first", "gaps", "stalls")
    return Tally(
        **{
            name: np.zeros((bins, CLASSES) if name in wide else 1 if name == "steps" else bins)
            for name in Tally.__struct_fields__
        }
    )


def added(tallies: Sequence[Tally]) -> Tally:
    """The sum, in the order given."""
    return Tally(**{name: sum(getattr(tally, name) for tally in tallies) for name in Tally.__struct_fields__})


def record(histogram: Floats, values_s: Floats, weights: Floats) -> None:
    """Add values to one bin's histogram, `[CLASSES]`, in place."""
    place = np.log(np.maximum(values_s, LEAST_S) / LEAST_S) / _WIDTH
    classes = np.clip(place.astype(np.int64), 0, CLASSES - 1)
    histogram += np.bincount(classes.ravel(), np.broadcast_to(weights, values_s.shape).ravel(), minlength=CLASSES)


def quantile(histogram: Floats, share: float) -> float | None:
    """The middle of the class in which the quantile lies; `None` of nothing."""
    total = float(histogram.sum())
    if total <= 0:
        return None
    place = min(CLASSES - 1, int(np.searchsorted(np.cumsum(histogram), share * total)))
    return float(LEAST_S * np.exp((place + 0.5) * _WIDTH))


def samples(tally: Tally, bin_s: float, lasts_s: Floats) -> tuple[Sample, ...]:
    """One for each bin; the last may be shorter (`lasts_s`)."""
    started, refused, failed = (_whole(part) for part in (tally.started, tally.refused, tally.failed))
    finished = _whole(np.maximum(tally.begun - tally.failed, 0.0))
    orders, repairs = _whole(tally.orders), _whole(tally.repairs)
    found = []
    for index, last_s in enumerate(lasts_s.tolist()):
        found.append(
            Sample(
                at_s=index * bin_s,
                devices_available=float(tally.device_s[index] / last_s),
                capacity_tokens_per_s=float(tally.capacity[index] / last_s),
                offered_tokens_per_s=float(tally.offered[index] / last_s),
                served_tokens_per_s=float(tally.served[index] / last_s),
                sessions_started=started[index],
                sessions_finished=finished[index],
                sessions_refused=refused[index],
                sessions_failed=failed[index],
                first_token_p50_s=quantile(tally.first[index], 0.5),
                first_token_p99_s=quantile(tally.first[index], 0.99),
                inter_token_p50_s=quantile(tally.gaps[index], 0.5),
                inter_token_p99_s=quantile(tally.gaps[index], 0.99),
                stall_p95_s=quantile(tally.stalls[index], 0.95),
                hops_mean=float(tally.hops[index] / tally.begun[index]) if tally.begun[index] > 0 else None,
                orders=orders[index],
                repairs=repairs[index],
                bytes_moved=float(tally.file_bytes[index]),
            )
        )
    return tuple(found)


def _whole(values: Floats) -> list[int]:
    """Whole numbers whose sums are right: each the difference of two rounded sums."""
    return [int(value) for value in np.diff(np.concatenate(([0.0], np.round(np.cumsum(values)))))]


def totals(tally: Tally, found: Sequence[Sample]) -> Totals:
    """The whole run."""
    finished, failed = sum(s.sessions_finished for s in found), sum(s.sessions_failed for s in found)
    first, gaps, stalls = tally.first.sum(axis=0), tally.gaps.sum(axis=0), tally.stalls.sum(axis=0)
    capacity, begun = float(tally.capacity.sum()), float(tally.begun.sum())
    return Totals(
        sessions_started=sum(s.sessions_started for s in found),
        sessions_finished=finished,
        sessions_refused=sum(s.sessions_refused for s in found),
        sessions_failed=failed,
        sessions_altered=None,
        tokens_served=round(float(tally.served.sum())),
        utilisation=float(tally.served.sum()) / capacity if capacity else None,
        success_rate=finished / (finished + failed) if finished + failed else 1.0,
        first_token_p50_s=quantile(first, 0.5),
        first_token_p99_s=quantile(first, 0.99),
        inter_token_p50_s=quantile(gaps, 0.5),
        inter_token_p99_s=quantile(gaps, 0.99),
        stall_p95_s=quantile(stalls, 0.95),
        stalls=round(float(tally.stalls.sum())),
        hops_mean=float(tally.hops.sum()) / begun if begun else None,
        orders=sum(s.orders for s in found),
        repairs=sum(s.repairs for s in found),
        bytes_moved=float(tally.file_bytes.sum()),
    )

"""Counts what a run did and turns it into the figures of a `RunResult`.

A bin holds what began or ended in it: latencies belong to the bin in which their session ended.
"""

import math
from collections.abc import Sequence

from fallow.simulator.gateways import Outcome, Turn
from fallow.simulator.results import Sample, Totals


def quantile(values: Sequence[float], share: float) -> float | None:
    """The nearest-rank quantile; `None` of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))]


class _Bin:
    def __init__(self) -> None:
        self.started = 0
        self.ended: list[Turn] = []
        self.available: list[int] = []
        self.capacity: list[float] = []
        self.offered_tokens = 0
        self.orders = 0
        self.tokens = 0
        self.file_bytes = 0


class Meter:
    """One run's figures. Times are seconds of the scenario."""

    def __init__(self, from_s: float, until_s: float, bin_s: float) -> None:
        self._from_s = from_s
        self.bin_s = bin_s
        self._bins = [_Bin() for _ in range(max(1, math.ceil((until_s - from_s) / bin_s - 1e-9)))]
        self._file_bytes_before = 0
        self.turns: list[Turn] = []
        """All that ended."""

    def _bin(self, at_s: float) -> _Bin:
        index = int((at_s - self._from_s) / self.bin_s)
        return self._bins[max(0, min(index, len(self._bins) - 1))]

    # --- what happens ---

    def asked(self, at_s: float, tokens: int) -> None:
        """A session arrived that wants so many tokens."""
        self._bin(at_s).started += 1
        self._bin(at_s).offered_tokens += tokens

    def ended(self, at_s: float, turn: Turn) -> None:
        """A session ended."""
        self._bin(at_s).ended.append(turn)
        self._bin(at_s).tokens += turn.tokens
        self.turns.append(turn)

    def ordered(self, at_s: float) -> None:
        self._bin(at_s).orders += 1

    def observed(self, at_s: float, available: int, capacity_tokens_per_s: float, file_bytes: int) -> None:
        """The state at a moment; `file_bytes` counts from the start."""
        into = self._bin(at_s)
        into.available.append(available)
        into.capacity.append(capacity_tokens_per_s)
        into.file_bytes += file_bytes - self._file_bytes_before
        self._file_bytes_before = file_bytes

    # --- what came of it ---

    def samples(self) -> tuple[Sample, ...]:
        return tuple(self._sample(self._from_s + index * self.bin_s, each) for index, each in enumerate(self._bins))

    def _sample(self, at_s: float, counted: _Bin) -> Sample:
        outcomes = [turn.outcome for turn in counted.ended]
        first, gaps, stalls, hops = _latencies(counted.ended)
        return Sample(
            at_s=at_s,
            devices_available=_mean(counted.available) or 0.0,
            capacity_tokens_per_s=_mean(counted.capacity),
            offered_tokens_per_s=counted.offered_tokens / self.bin_s,
            served_tokens_per_s=counted.tokens / self.bin_s,
            sessions_started=counted.started,
            sessions_finished=sum(_is_finished(outcome) for outcome in outcomes),
            sessions_refused=outcomes.count(Outcome.REFUSED),
            sessions_failed=outcomes.count(Outcome.FAILED),
            first_token_p50_s=quantile(first, 0.5),
            first_token_p99_s=quantile(first, 0.99),
            inter_token_p50_s=quantile(gaps, 0.5),
            inter_token_p99_s=quantile(gaps, 0.99),
            stall_p95_s=quantile(stalls, 0.95),
            hops_mean=_mean(hops),
            orders=counted.orders,
            repairs=sum(turn.repairs for turn in counted.ended),
            bytes_moved=float(counted.file_bytes),
        )

    def totals(self) -> Totals:
        outcomes = [turn.outcome for turn in self.turns]
        first, gaps, stalls, hops = _latencies(self.turns)
        finished, failed = sum(map(_is_finished, outcomes)), outcomes.count(Outcome.FAILED)
        unaltered = outcomes.count(Outcome.FINISHED)
        undisturbed = sum(bool(turn.gaps_s) and not turn.repairs for turn in self.turns)
        capacity = sum((_mean(each.capacity) or 0.0) * self.bin_s for each in self._bins)
        tokens = sum(turn.tokens for turn in self.turns)
        return Totals(
            sessions_started=sum(each.started for each in self._bins),
            sessions_finished=finished,
            sessions_refused=outcomes.count(Outcome.REFUSED),
            sessions_failed=failed,
            sessions_altered=outcomes.count(Outcome.ALTERED),
            tokens_served=tokens,
            utilisation=tokens / capacity if capacity else None,
            success_rate=unaltered / (finished + failed) if finished + failed else 1.0,
            first_token_p50_s=quantile(first, 0.5),
            first_token_p99_s=quantile(first, 0.99),
            inter_token_p50_s=quantile(gaps, 0.5),
            inter_token_p99_s=quantile(gaps, 0.99),
            stall_p95_s=quantile(stalls, 0.95),
            stalls=len(stalls),
            stall_all_p95_s=quantile(stalls + [0.0] * undisturbed, 0.95),
            hops_mean=_mean(hops),
            orders=sum(each.orders for each in self._bins),
            repairs=sum(turn.repairs for turn in self.turns),
            bytes_moved=float(sum(each.file_bytes for each in self._bins)),
        )


def _is_finished(outcome: Outcome) -> bool:
    return outcome in (Outcome.FINISHED, Outcome.ALTERED)


def _latencies(turns: Sequence[Turn]) -> tuple[list[float], list[float], list[float], list[float]]:
    """Times to the first token, gaps between tokens, longest gaps of sessions that lost a stage, hops."""
    first = [turn.first_token_s - turn.asked_s for turn in turns if turn.first_token_s is not None]
    gaps = [gap for turn in turns for gap in turn.gaps_s]
    stalls = [max(turn.gaps_s) for turn in turns if turn.repairs and turn.gaps_s]
    hops = [float(turn.hops) for turn in turns if turn.hops]
    return first, gaps, stalls, hops


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None

"""What happened in a run, in sentences that are computed from its figures. Pure.

Rules
- Nothing is said that the figures do not hold: a sentence whose figures are missing is left out.
- Sentences are plain text; whoever shows them escapes them. Marks' labels come from files.
"""

from collections import deque
from typing import Final, NamedTuple

from fallow.simulator.report_words import clock, count, fraction, share, size, span_of
from fallow.simulator.results import Mark, Mode, RunResult, Sample

FALL_WINDOW_S: Final = 2 * 3600.0
"""A fall of the fleet is told as one event when it takes at most this long."""
FALL_MIN: Final = 0.15
"""Share of the fleet that must go before it is told as a fall."""
LABEL_MAX: Final = 120
"""Characters of a mark's label that are shown."""


class Fall(NamedTuple):
    """The steepest loss of devices."""

    top: Sample
    bottom: Sample

    @property
    def share(self) -> float:
        return 1 - self.bottom.devices_available / self.top.devices_available


def steepest_fall(samples: tuple[Sample, ...]) -> Fall | None:
    """The largest relative fall of the devices at hand within `FALL_WINDOW_S`, from a running maximum."""
    best: Fall | None = None
    highest: deque[Sample] = deque()
    for sample in samples:
        while highest and sample.at_s - highest[0].at_s > FALL_WINDOW_S:
            highest.popleft()
        if highest and highest[0].devices_available > 0:
            fall = Fall(highest[0], sample)
            if best is None or fall.share > best.share:
                best = fall
        while highest and highest[-1].devices_available <= sample.devices_available:
            highest.pop()
        highest.append(sample)
    return best


def story(result: RunResult) -> tuple[str, ...]:
    """The headline first; then one sentence or two each about the fleet, strain, latency, and what it cost."""
    parts = (_answered(result), _fleet(result), _strain(result), _latency(result), _stalls(result), _cost(result))
    return tuple(part for part in parts if part)


def _clock(result: RunResult, sample: Sample) -> str:
    return clock(result.start_hour_of_week + sample.at_s / 3600)


def _answered(result: RunResult) -> str:
    totals = result.totals
    fleet = f"{count(result.devices)} devices" + (f" in {count(result.cells)} cells" if result.cells > 1 else "")
    if not totals.sessions_started:
        return f"In {span_of(result.simulated_s)} nobody asked {fleet} for anything."
    text = (
        f"In {span_of(result.simulated_s)}, {fleet} were asked {count(totals.sessions_started)} times and wrote "
        f"{count(totals.tokens_served)} tokens. Of the accepted requests {share(totals.success_rate)} finished"
    )
    refused = totals.sessions_refused / totals.sessions_started
    text += f"; {share(refused)} of all were told at once to come again later." if refused else "; none was refused."
    if totals.sessions_altered:
        text += f" {count(totals.sessions_altered)} answers were altered."
    return text


def _fleet(result: RunResult) -> str:
    levels = [sample.devices_available for sample in result.samples]
    if not levels:
        return ""
    fall = steepest_fall(result.samples)
    if fall is None or fall.share < FALL_MIN:
        return f"Between {count(min(levels))} and {count(max(levels))} devices were at hand at any time."
    about = _what(result, fall)
    lost = fraction(fall.share) if fall.share < 1 else "all"
    return (
        f"Between {_clock(result, fall.top)} and {_clock(result, fall.bottom)} {lost} of the devices at hand went away"
        f"{about}: from {count(fall.top.devices_available)} to {count(fall.bottom.devices_available)}. "
        + _during(result, fall)
    ).strip()


def _what(result: RunResult, fall: Fall) -> str:
    """The scripted event under way at the fall, if there is one. Whether it is the cause, figures do not tell."""
    end = fall.bottom.at_s + result.bin_s
    under_way = [mark for mark in result.marks if mark.at_s < end and mark.until_s >= fall.top.at_s]
    if not under_way:
        return ""
    return f" (at the same time: {label_of(min(under_way, key=lambda mark: abs(mark.at_s - fall.top.at_s)))})"


def label_of(mark: Mark) -> str:
    """The label, short enough for a line."""
    return mark.label if len(mark.label) <= LABEL_MAX else mark.label[: LABEL_MAX - 1] + "…"


def _during(result: RunResult, fall: Fall) -> str:
    """How the requests fared from the start of the fall to one window after its end."""
    hit = [s for s in result.samples if fall.top.at_s <= s.at_s <= fall.bottom.at_s + FALL_WINDOW_S / 2]
    started = sum(sample.sessions_started for sample in hit)
    ended = sum(sample.sessions_finished + sample.sessions_failed for sample in hit)
    if not started or not ended:
        return ""
    refused = sum(sample.sessions_refused for sample in hit) / started
    finished = sum(sample.sessions_finished for sample in hit) / ended
    told = f"{share(refused)} were refused" if refused else "none was refused"
    return f"Of the requests around that time {told} and {share(finished)} of the accepted ones finished."


def _strain(result: RunResult) -> str:
    ratios = [(s.offered_tokens_per_s / s.capacity_tokens_per_s, s) for s in result.samples if s.capacity_tokens_per_s]
    if not ratios:
        return ""
    worst, sample = max(ratios, key=lambda item: item[0])
    at = _clock(result, sample)
    if worst <= 1:
        return f"Load came closest to what the fleet could serve at {at}: {share(worst)} of it."
    over_s = sum(result.bin_s for ratio, _ in ratios if ratio > 1)
    return (
        f"For {span_of(over_s)} altogether, more was asked than the fleet could serve; at {at} it was "
        f"{worst:.2g} times as much."
    )


def _latency(result: RunResult) -> str:
    totals = result.totals
    if totals.first_token_p50_s is None or totals.inter_token_p50_s is None:
        return ""
    text = f"Half of the answers began within {span_of(totals.first_token_p50_s)}"
    if totals.first_token_p99_s is not None:
        text += f", 99 in 100 within {span_of(totals.first_token_p99_s)}"
    text += f"; a token followed the last after {span_of(totals.inter_token_p50_s)} at the median"
    if totals.inter_token_p99_s is not None:
        text += f" and {span_of(totals.inter_token_p99_s)} at the 99th percentile"
    return text + "."


def _stalls(result: RunResult) -> str:
    totals = result.totals
    if not totals.stalls or totals.stall_p95_s is None:
        return ""
    return (
        f"{count(totals.stalls)} answers lost a device on the way and went on with another; "
        f"95 in 100 of them paused for less than {span_of(totals.stall_p95_s)}."
    )


def _cost(result: RunResult) -> str:
    totals = result.totals
    if not totals.orders:
        return ""
    each = totals.bytes_moved / max(result.devices, 1)
    return (
        f"To keep every layer covered, devices were given {count(totals.orders)} orders and fetched "
        f"{size(totals.bytes_moved)} of model files, {size(each)} for each device."
    )


MODE_WORDS: Final = {
    Mode.DETAILED: "every message of every device",
    Mode.FAST: "whole cells as arrays",
}

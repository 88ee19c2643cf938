"""What a run of the simulator found: figures over time, totals, broken invariants. Written as JSON, shown by a report.

Both modes fill the same values, so that one report shows either and two runs can be set side by side. What a mode does
not model is `None`, never a made-up figure.
"""

from enum import StrEnum
from pathlib import Path

import msgspec

from fallow.domain.errors import ConfigError


class Mode(StrEnum):
    """How a run was made."""

    DETAILED = "detailed"
    """Every message of every device."""
    FAST = "fast"
    """Whole cells as arrays."""


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One bin of time, all devices together. Latencies are `None` where nothing ended in the bin."""

    at_s: float
    """The bin's start."""
    devices_available: float
    """Mean over the bin."""
    capacity_tokens_per_s: float | None
    """What placement and routing could serve (the bound that stages and speeds allow)."""
    offered_tokens_per_s: float
    served_tokens_per_s: float
    sessions_started: int
    sessions_finished: int
    sessions_refused: int
    """Told at once to come again later."""
    sessions_failed: int
    """Accepted, and ended without their answer."""
    first_token_p50_s: float | None = None
    first_token_p99_s: float | None = None
    inter_token_p50_s: float | None = None
    inter_token_p99_s: float | None = None
    stall_p95_s: float | None = None
    """Of the longest gap of each session that lost a stage."""
    hops_mean: float | None = None
    orders: int = 0
    """Stages that devices were told to host or drop."""
    repairs: int = 0
    """Chains mended under a running answer."""
    bytes_moved: float = 0.0
    """Model files fetched."""


class Totals(msgspec.Struct, frozen=True, kw_only=True):
    """The whole run."""

    sessions_started: int
    sessions_finished: int
    sessions_refused: int
    sessions_failed: int
    sessions_altered: int | None
    """Finished with other tokens than an undisturbed run would give; the fast mode cannot tell."""
    tokens_served: int
    utilisation: float | None
    """Tokens served by tokens that the available devices could have served."""
    success_rate: float
    """Finished unaltered by (finished + failed). Refusals are reported beside it."""
    first_token_p50_s: float | None = None
    first_token_p99_s: float | None = None
    inter_token_p50_s: float | None = None
    inter_token_p99_s: float | None = None
    stall_p95_s: float | None = None
    stalls: int | None = None
    stall_all_p95_s: float | None = None
    """The same over all answers; one that lost no stage counts as 0."""
    hops_mean: float | None = None
    orders: int = 0
    repairs: int | None = None
    bytes_moved: float = 0.0


class Violation(msgspec.Struct, frozen=True, kw_only=True):
    """An invariant that did not hold."""

    invariant: str
    """The name of its function in `invariants.py`."""
    at_s: float
    detail: str


class Mark(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened, to be drawn beside the figures."""

    at_s: float
    until_s: float
    label: str


class Breakage(msgspec.Struct, frozen=True, kw_only=True):
    """A partition, as answers that were being given saw it."""

    at_s: float
    answers: int
    """That lost a device."""
    least_mend_s: float | None
    """Once it was noticed, nobody could have mended all of them sooner (`breakage.py`)."""


class RunResult(msgspec.Struct, frozen=True, kw_only=True):
    """All of it."""

    scenario: str
    title: str
    about: str
    mode: Mode
    seed: int
    devices: int
    cells: int
    simulated_s: float
    wall_s: float
    start_hour_of_week: float
    bin_s: float
    event_hash: str
    """Equal for equal scenario, seed and code, on any machine; `wall_s` is not part of it."""
    events: int
    """How many steps the run took."""
    totals: Totals
    samples: tuple[Sample, ...]
    marks: tuple[Mark, ...] = ()
    violations: tuple[Violation, ...] = ()
    breakages: tuple[Breakage, ...] = ()


def write_result(result: RunResult, path: Path) -> None:
    """As JSON that a person can read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1))


def read_result(path: Path) -> RunResult:
    """Raises `ConfigError` when the file is not a run's result."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=RunResult)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{path}: not a result of `fallow sim run`: {error}") from error

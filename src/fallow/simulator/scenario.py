"""A scenario: which devices, what they are asked, what happens to them. A TOML file, parsed once.

Rules
- Both modes of the simulator run the same scenario: the detailed one with `detailed.devices` devices for
  `detailed.hours`, drawn from the populations in proportion; the fast one with all of them for `hours`.
- A key or a value that makes no sense is a `ConfigError` that names the file, the key and what was expected.
- Times are seconds since the scenario's start, which is `start_hour_of_week` hours after Monday 00:00, local time.

It draws nothing and runs nothing: `lives.py` draws devices' comings and goings, `world.py` and `fast.py` run.
"""

import tomllib
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final

import msgspec

from fallow.domain.errors import ConfigError

SCENARIO_MAX_BYTES: Final = 1 << 20
HOURS_A_WEEK: Final = 168

Positive = Annotated[float, msgspec.Meta(gt=0)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Count = Annotated[int, msgspec.Meta(ge=1)]
Name = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9-]{1,40}$")]


class Habit(StrEnum):
    """When a kind of device is free. `lives.py` has the distributions and where they come from."""

    ALWAYS = "always"
    """A home server: up, with rare short outages."""
    HOME = "home"
    """A home computer: free in the small hours and while its owner is away, used in the evening."""
    OFFICE = "office"
    """An office computer: used in office hours, free at night and at the weekend."""
    CAMPUS = "campus"
    """A pool computer: short, frequent absences."""
    VEHICLE = "vehicle"
    """A car: parked most of the day, and free only while it is also plugged in; departs with the commute."""
    MEMORYLESS = "memoryless"
    """Up and down by exponential times: for benchmarks of churn (`median_up_s`)."""


class Population(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Devices of one kind in one region."""

    name: Name
    habit: Habit
    count: Count
    region: Name = "here"
    layer_s: Positive = 0.004
    """Median seconds that a layer of the scenario's model takes for one row on such a device."""
    layer_s_spread: Annotated[float, msgspec.Meta(ge=0, le=3)] = 0.5
    """Standard deviation of its logarithm over the population."""
    memory_bytes: Count = 8 << 30
    """For weights and KV cache; a quarter is the cache."""
    memory_spread: Annotated[float, msgspec.Meta(ge=0, le=3)] = 0.3
    uplink_bytes_per_s: Positive = 2_500_000.0
    downlink_bytes_per_s: Positive = 12_500_000.0
    metro_rtt_s: Positive = 0.018
    """Median round trip to others of the region."""
    nat_blocked: Share = 0.3
    """Share of pairs in which hole punching fails, so that a relay carries the link."""
    median_up_s: Positive = 7200.0
    """For `memoryless` only."""
    median_down_s: Positive = 3600.0
    """For `memoryless` only."""
    declares: Share = 0.3
    """Share of owners who declare windows or a departure time, and mostly keep to them."""


class SimulatedModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the model that is served weighs. The default is the shape of an 8-billion-parameter model in 4 bits."""

    layer_count: Count = 32
    layer_bytes: Count = 118 << 20
    embedding_bytes: Count = 525 << 20
    head_bytes: Count = 525 << 20
    kv_bytes_per_token_layer: Count = 8192
    activation_bytes_per_row: Count = 8192
    """On the wire, fp16."""


class Traffic(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What clients ask: sessions arrive as a Poisson process whose rate follows the hour of the day."""

    sessions_per_hour_per_device: Annotated[float, msgspec.Meta(ge=0)] = 0.5
    """Mean over the day, for each device of the fleet, so that load keeps its proportion when the fleet is scaled."""
    by_hour: Annotated[tuple[float, ...], msgspec.Meta(min_length=24, max_length=24)] = (1.0,) * 24
    """Weight of each hour of the day; normalised to mean 1."""
    prompt_tokens: Count = 200
    """Median; lognormal."""
    completion_tokens: Count = 120
    """Median; lognormal."""
    spread: Annotated[float, msgspec.Meta(ge=0, le=2)] = 0.6
    priority_share: Share = 0.0
    """Share of sessions for which another chain is to stand by (`ServiceTier.PRIORITY`)."""
    keys: Count = 8
    """Clients, by API key, who share the traffic unevenly (the k-th asks in proportion to 1/k)."""


class EventKind(StrEnum):
    """What may happen."""

    FLASH_CROWD = "flash-crowd"
    """Traffic is multiplied by `factor` for `duration_s`."""
    OUTAGE = "outage"
    """Every device of `region` (and `population`, if named) is gone at once for `duration_s`."""
    PARTITION = "partition"
    """Nothing passes between `region` and the rest for `duration_s`."""
    COORDINATOR_LOSS = "coordinator-loss"
    """The leading coordinator is killed; another takes over, or it restarts after `duration_s`."""
    ROLLING_UPDATE = "rolling-update"
    """Every device of `population` restarts once, politely, spread over `duration_s`."""
    SLOW_ROT = "slow-rot"
    """`share` of the devices become `factor` times slower, gradually over `duration_s`, and stay so."""
    RECLAIM = "reclaim"
    """The owners of `share` of the devices come home within `duration_s` and take them back for `hold_s`."""


class Event(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Something scripted."""

    kind: EventKind
    at_s: Annotated[float, msgspec.Meta(ge=0)]
    duration_s: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    hold_s: Annotated[float, msgspec.Meta(ge=0)] = 7200.0
    region: Name | None = None
    population: Name | None = None
    share: Share = 1.0
    factor: Positive = 1.0


class Network(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What lies between regions, and how rough it is."""

    continent_rtt_s: Positive = 0.045
    """Between two regions of which no other figure is given."""
    regions_rtt_s: dict[str, Positive] = {}
    """By `"one/other"`."""
    jitter_share: Share = 0.1
    """Standard deviation of a delay, as a share of it."""
    loss: Share = 0.001
    """Share of packets lost; each costs a retransmission of one round trip and a half."""
    relay_extra_s: Annotated[float, msgspec.Meta(ge=0)] = 0.015
    """One-way delay that a relayed link adds."""


class Detailed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the detailed mode takes of the scenario."""

    devices: Count = 60
    hours: Positive = 1.0
    start_after_s: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """Where in the scenario it starts, for example just before an event."""
    heartbeat_interval_s: Positive = 10.0


class Scenario(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of it."""

    name: Name
    title: str
    about: str
    hours: Positive = 24.0
    start_hour_of_week: Annotated[float, msgspec.Meta(ge=0, lt=HOURS_A_WEEK)] = 0.0
    cell_devices: Count = 300
    """How many devices a cell has, about."""
    model: SimulatedModel = SimulatedModel()
    traffic: Traffic = Traffic()
    network: Network = Network()
    detailed: Detailed = Detailed()
    populations: Annotated[tuple[Population, ...], msgspec.Meta(min_length=1, max_length=50)]
    events: Annotated[tuple[Event, ...], msgspec.Meta(max_length=200)] = ()

    @property
    def devices(self) -> int:
        return sum(population.count for population in self.populations)


def decode_scenario(text: str, source: str) -> Scenario:
    """Parse and check. Raises `ConfigError` with `source`, the key and what was expected."""
    try:
        scenario = msgspec.convert(tomllib.loads(text), Scenario)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise ConfigError(f"{source}: {error}") from error
    names = [population.name for population in scenario.populations]
    regions = {population.region for population in scenario.populations}
    if len(set(names)) < len(names):
        raise ConfigError(f"{source}: populations: two have the same name ({', '.join(sorted(names))})")
    for index, event in enumerate(scenario.events):
        where = f"{source}: events[{index}] ({event.kind})"
        if event.population is not None and event.population not in names:
            raise ConfigError(f"{where}: no population is called {event.population!r}; there are {', '.join(names)}")
        if event.region is not None and event.region not in regions:
            raise ConfigError(f"{where}: no population is in region {event.region!r}")
        if event.kind is EventKind.PARTITION and event.region is None:
            raise ConfigError(f"{where}: a partition needs a region")
        if event.at_s > scenario.hours * 3600:
            raise ConfigError(f"{where}: happens after the end ({scenario.hours:g} h)")
    return scenario


def load_scenario(path: Path) -> Scenario:
    """Read a scenario's file. Raises `ConfigError`."""
    try:
        data = path.read_bytes()[: SCENARIO_MAX_BYTES + 1]
        if len(data) > SCENARIO_MAX_BYTES:
            raise ConfigError(f"{path}: a scenario has at most {SCENARIO_MAX_BYTES} bytes")
        return decode_scenario(data.decode(), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the scenario cannot be read: {error}") from error

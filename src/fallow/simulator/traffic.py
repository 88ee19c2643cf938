"""Simulated clients: when they ask, what they ask, and whether they go on.

Rules: sessions arrive in each cell as a Poisson process whose rate follows the hour of the day and flash crowds (by
thinning, Lewis and Shedler 1979). Lengths are lognormal. Keys share the traffic in proportion to 1/k. A share of
answers is followed by another turn of the same conversation after a pause.
"""

import math
import random
from collections.abc import Iterator
from typing import Final

from fallow.domain.service import ServiceTier
from fallow.simulator.gateways import Ask
from fallow.simulator.model import CONTEXT_TOKENS, VOCABULARY
from fallow.simulator.scenario import EventKind, Scenario
from fallow.simulator.scenario import Traffic as TrafficFigures
from fallow.simulator.streams import Streams

FOLLOW_UP: Final = 0.25
"""Share of answers after which the conversation goes on."""
PAUSE_S: Final = 20.0
"""Median time that a person takes before the next turn."""
TOKENS_MIN: Final = 2


class Traffic:
    """One cell's clients. `devices` is the size of its fleet, away or not."""

    def __init__(self, scenario: Scenario, streams: Streams, cell: str, devices: int) -> None:
        self._scenario = scenario
        self._traffic = scenario.traffic
        self._arrivals = streams.stream("arrivals", cell)
        self._streams = streams
        self._cell = cell
        self._asked = 0
        self._mean_per_s = self._traffic.sessions_per_hour_per_device * devices / 3600
        weights = self._traffic.by_hour
        mean = sum(weights) / len(weights)
        self._by_hour = [weight / mean if mean else 0.0 for weight in weights]
        crowds = [event.factor for event in scenario.events if event.kind is EventKind.FLASH_CROWD]
        self._rate_max = self._mean_per_s * max(self._by_hour) * math.prod(max(1.0, factor) for factor in crowds)

    def rate_per_s(self, at_s: float) -> float:
        """Sessions a second at a time of the scenario."""
        hour = int(self._scenario.start_hour_of_week + at_s / 3600) % 24
        rate = self._mean_per_s * self._by_hour[hour]
        for event in self._scenario.events:
            if event.kind is EventKind.FLASH_CROWD and event.at_s <= at_s < event.at_s + event.duration_s:
                rate *= event.factor
        return rate

    def arrivals(self, from_s: float, until_s: float) -> Iterator[float]:
        """When sessions arrive."""
        at_s = from_s
        while self._rate_max > 0:
            at_s += self._arrivals.expovariate(self._rate_max)
            if at_s >= until_s:
                return
            if self._arrivals.random() * self._rate_max < self.rate_per_s(at_s):
                yield at_s

    def conversation(self) -> "Client":
        """The next client. What it does depends on its number alone, not on what happens meanwhile."""
        self._asked += 1
        return Client(self._traffic, self._streams.stream("client", self._cell, str(self._asked)))


class Client:
    """Somebody who asks, reads, thinks, and may ask again."""

    def __init__(self, traffic: TrafficFigures, draw: random.Random) -> None:
        self._traffic = traffic
        self._draw = draw
        weights = [1 / (index + 1) for index in range(traffic.keys)]
        self._key = f"key{draw.choices(range(traffic.keys), weights)[0]}"
        share = traffic.priority_share  # at 0 and 1 nothing is drawn, so that clients ask the same with and without
        self._tier = ServiceTier.PRIORITY if share and (share == 1 or draw.random() < share) else ServiceTier.DEFAULT

    def ask(self) -> Ask:
        """The conversation's first question."""
        return self._ask(_random_tokens(self._draw, self._length(self._traffic.prompt_tokens)))

    def follow_up(self, ask: Ask, answer: list[int]) -> Ask | None:
        """The next turn after an answer, if it still fits the context."""
        added = _random_tokens(self._draw, self._length(self._traffic.prompt_tokens) // 4 + 1)
        following = self._ask((*ask.prompt, *answer, *added))
        return following if len(following.prompt) + following.completion_tokens <= CONTEXT_TOKENS else None

    def pause_s(self) -> float:
        return self._draw.lognormvariate(math.log(PAUSE_S), 0.6)

    def gateway(self, count: int) -> int:
        """Which of the cell's gateways it reaches."""
        return self._draw.randrange(count)

    def _ask(self, prompt: tuple[int, ...]) -> Ask:
        wanted = self._length(self._traffic.completion_tokens)
        keep = self._draw.random() < FOLLOW_UP
        return Ask(key=self._key, prompt=prompt, completion_tokens=wanted, keep=keep, tier=self._tier)

    def _length(self, median: int) -> int:
        drawn = int(self._draw.lognormvariate(math.log(median), self._traffic.spread))
        return max(TOKENS_MIN, min(drawn, CONTEXT_TOKENS // 4))


def _random_tokens(draw: random.Random, count: int) -> tuple[int, ...]:
    bits = draw.getrandbits(12 * count)
    return tuple((bits >> (12 * index)) % VOCABULARY for index in range(count))

"""Which waiting request may begin, which must wait, and which is told at once to come again later.

Rules
- An answer takes a place while it is generated. How many places there are follows what the fleet shows (`adapted`):
  more while all are taken and tokens come quickly, fewer when tokens come slower than `stretch` times the idle gap, or
  when devices had no room beside others' answers (one that finds none alone is too large for them). This is the
  gradient of latency (as in TCP Vegas, and Netflix's concurrency limits), with a stretch because devices compute
  several rows at once for little more than one. It begins with few places, so that the idle gap is seen before the
  fleet is full, and grows fast until tokens come too slowly for the first time.
- Fair between keys, by tokens and not by requests: each key has a counter of the tokens that it was served, and the
  waiting key with the lowest counter is next (the virtual token counter of Sheng and others, OSDI 2024). What runs
  counts with what its key's answers usually cost, until it is known. A key that comes back after a pause begins at the
  lowest counter of those who are there, so that nobody saves up credit.
- While other keys have been there lately, no key takes the last `reserve_share` of the places: who asks seldom does
  not wait for a place of who asks always.
- A request that would wait longer than `wait_max_s`, as predicted from the places and how long answers take, is
  refused when it comes, with the time after which it would be taken. So is one more than `waiting_max`, or more than
  `waiting_key_max` of one key.

Pure: `FairQueue` is a value that only its methods change; the time is an argument. It sends nothing and waits for
nothing; `gateway/admission.py` does.
"""

from enum import StrEnum
from typing import Final

import msgspec

KEYS_MAX: Final = 2048
"""Whose counters are kept; the longest absent are forgotten first."""


class AdmissionRules(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds and weights."""

    places_first: int = 4
    """How many there are before anything was measured."""
    places_min: int = 1
    places_max: int = 256
    stretch: float = 5.0
    """Tokens may come so much slower than on an idle fleet: eight rows at once cost a device 2.6 times one and sixteen
    4.4 times, and a chain has several devices to wait at."""
    growth_first: float = 1.6
    """Of the places in a window, until tokens came half as slowly as they may for the first time."""
    growth: float = 1.05
    """From then on. As gentle as the fall below: places that swing begin and end many answers at once."""
    samples_min: int = 20
    """Gaps between tokens without which a window goes on, for `window_max_s` at most."""
    window_s: float = 1.0
    window_first_s: float = 0.25
    """Until the fleet was seen to have work: a few people who come at once should not wait."""
    window_max_s: float = 10.0
    gradient_min: float = 0.95
    """The number of places falls by at most this factor below the answers that run, in a window. Nobody can begin until
    so many have ended, and then many at once, which costs the devices more than they save."""
    gap_weight: float = 0.3
    """Of the newest window's gap in the mean that decides."""
    quiet_share: float = 0.25
    """A window in which no more of the places were taken shows the idle gap, also when it has grown."""
    quiet_weight: float = 0.2
    wait_max_s: float = 10.0
    waiting_max: int = 512
    waiting_key_max: int = 128
    reserve_share: float = 0.0625
    lately_s: float = 30.0
    prompt_weight: float = 0.25
    """Of a prompt's token, next to a generated one: prompts are computed in chunks."""
    answer_tokens_first: float = 128.0
    """What an answer is believed to cost before its key had one."""
    memory: float = 0.1
    """Weight of the newest answer in a mean."""


# --- how many places --------------------------------------------------------------------------------


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured over a second or some."""

    gap_s: float | None
    """The median time between two tokens of an answer; `None` when there were too few."""
    running_most: int
    """Places that were taken at once, at the most."""
    no_room: bool = False
    """Whether devices refused an answer for lack of room."""
    running_then: int = 0
    """Places that other requests had taken then."""


class Places(msgspec.Struct, frozen=True, kw_only=True):
    """How many answers may run."""

    count: float
    idle_gap_s: float | None = None
    """The time between tokens when few answers run."""
    gap_s: float | None = None
    """The time between tokens now."""
    was_full: bool = False
    """Whether the fleet was ever seen to have work: from then on, places grow carefully."""

    @property
    def whole(self) -> int:
        return int(self.count)


def places_first(rules: AdmissionRules) -> Places:
    return Places(count=float(max(rules.places_min, min(rules.places_first, rules.places_max))))


def adapted(places: Places, window: Window, rules: AdmissionRules) -> Places:
    """The places after a window."""
    idle_s = _idle_gap_s(places, window, rules)
    gap_s = window.gap_s
    if gap_s is not None and places.gap_s is not None:
        gap_s = _mixed(places.gap_s, gap_s, rules.gap_weight)
    count, was_full = places.count, places.was_full
    if window.no_room and window.running_then:
        # Few others: that the request was large is more likely than that the fleet is full.
        was_full = was_full or not _quiet(window.running_then, count, rules)
        count = min(count, float(window.running_then))
    elif gap_s is not None and idle_s is not None:
        may_s = rules.stretch * idle_s
        was_full = was_full or (window.gap_s or 0.0) > may_s / 2
        if gap_s > may_s:
            # What runs made this gap. Counted from the places, long answers would shrink them again and again.
            count = min(count, window.running_most * max(rules.gradient_min, may_s / gap_s))
        elif window.running_most >= places.whole:
            count *= rules.growth if was_full else rules.growth_first
    count = max(float(rules.places_min), min(float(rules.places_max), count))
    return Places(count=count, idle_gap_s=idle_s, gap_s=gap_s, was_full=was_full)


def _idle_gap_s(places: Places, window: Window, rules: AdmissionRules) -> float | None:
    """Falls at once; rises only where few answers ran, so that nobody waited for anybody."""
    if window.gap_s is None:
        return places.idle_gap_s
    if places.idle_gap_s is None or window.gap_s < places.idle_gap_s:
        return window.gap_s
    if _quiet(window.running_most, places.count, rules):
        return places.idle_gap_s + rules.quiet_weight * (window.gap_s - places.idle_gap_s)
    return places.idle_gap_s


def _quiet(running: int, count: float, rules: AdmissionRules) -> bool:
    return running <= max(1.0, rules.quiet_share * count)


# --- whose turn -------------------------------------------------------------------------------------


class Why(StrEnum):
    """Why a request was refused."""

    QUEUE_FULL = "queue_full"
    KEY_FULL = "key_full"
    TOO_LONG = "too_long"


class Refusal(msgspec.Struct, frozen=True):
    """Come again after `retry_after_s`, when the wait is likely to be half of what is allowed."""

    why: Why
    retry_after_s: float


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One that waits or runs."""

    number: int
    owner: str
    places: int
    charged: float
    """Tokens that it is believed to cost."""
    prompt_cost: float
    arrived_s: float


class _Key(msgspec.Struct):
    """What is known of a key."""

    counter: float = 0.0
    """Tokens that it was served."""
    pending: float = 0.0
    """Tokens that its running answers are believed to cost."""
    running: int = 0
    waiting: int = 0
    answer_tokens: float | None = None
    seen_s: float = 0.0


class FairQueue:
    """Waiting and running requests of one gateway."""

    def __init__(self, rules: AdmissionRules) -> None:
        self._rules = rules
        self._keys: dict[str, _Key] = {}
        self._waiting: dict[int, Request] = {}
        self._running: dict[int, Request] = {}
        self._number = 0
        self._held_s: float | None = None
        """How long an answer holds its place, on average."""

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Places that are taken."""
        return sum(request.places for request in self._running.values())

    def counter(self, owner: str) -> float:
        """The tokens that a key was served, from its virtual beginning."""
        return self._keys[owner].counter if owner in self._keys else 0.0

    def arrive(self, owner: str, places: int, prompt_tokens: int, limit: int, now_s: float) -> Request | Refusal:
        """A request comes: it waits (perhaps for nothing; ask `begin`), or is refused. `limit` is the number of places
        now; a request for more than that takes all of them."""
        key = self._enter(owner, now_s)
        why, waits_s = self._refused(key, min(places, limit), limit)
        if why is not None:
            return Refusal(why, max(1.0, waits_s - self._rules.wait_max_s / 2))
        self._number += 1
        prompt_cost = prompt_tokens * self._rules.prompt_weight
        answer = self._rules.answer_tokens_first if key.answer_tokens is None else key.answer_tokens
        request = Request(
            number=self._number,
            owner=owner,
            places=places,
            charged=prompt_cost + answer * places,
            prompt_cost=prompt_cost,
            arrived_s=now_s,
        )
        self._waiting[request.number] = request
        key.waiting += 1
        return request

    def begin(self, limit: int, now_s: float) -> list[Request]:
        """The requests whose turn it is, in order; they run from now on."""
        begun: list[Request] = []
        running = self.running
        while self._waiting:
            request = self._next(limit, running, now_s)
            if request is None:
                break
            del self._waiting[request.number]
            self._running[request.number] = request
            key = self._keys[request.owner]
            key.waiting -= 1
            key.running += request.places
            key.pending += request.charged
            running += request.places
            begun.append(request)
        return begun

    def give_up(self, request: Request) -> None:
        """It waits no longer: its client hung up, or its time was over."""
        if self._waiting.pop(request.number, None) is not None:
            self._keys[request.owner].waiting -= 1

    def end(self, request: Request, answer_tokens: int, held_s: float, now_s: float) -> None:
        """A running request has ended, after `held_s` and so many tokens; its key is charged for what it really was."""
        if self._running.pop(request.number, None) is None:
            return
        rules, key = self._rules, self._keys[request.owner]
        key.running -= request.places
        key.seen_s = now_s
        key.pending -= request.charged
        key.counter += request.prompt_cost + answer_tokens
        if answer_tokens:
            each = answer_tokens / request.places
            key.answer_tokens = each if key.answer_tokens is None else _mixed(key.answer_tokens, each, rules.memory)
            self._held_s = held_s if self._held_s is None else _mixed(self._held_s, held_s, rules.memory)

    # --- helpers ---

    def _enter(self, owner: str, now_s: float) -> _Key:
        """The key of who asks now; one that was away begins where the others are."""
        key = self._keys.get(owner)
        if key is None:
            if len(self._keys) >= KEYS_MAX:
                self._forget()
            key = self._keys[owner] = _Key()
        if not key.running and not key.waiting:
            there = [other.counter for other in self._keys.values() if other.running or other.waiting]
            key.counter = max(key.counter, min(there, default=key.counter))
        key.seen_s = now_s
        return key

    def _forget(self) -> None:
        idle = [name for name, key in self._keys.items() if not key.running and not key.waiting]
        for name in sorted(idle, key=lambda name: self._keys[name].seen_s)[: KEYS_MAX // 4]:
            del self._keys[name]

    def _served(self, owner: str) -> float:
        return self._keys[owner].counter + self._keys[owner].pending

    def _next(self, limit: int, running: int, now_s: float) -> Request | None:
        """The oldest request of the key with the lowest counter that may have a place now."""
        heads: dict[str, Request] = {}
        for request in self._waiting.values():
            heads.setdefault(request.owner, request)
        for owner in sorted(heads, key=lambda name: (self._served(name), heads[name].number)):
            request = heads[owner]
            wanted = min(request.places, limit)
            mine = self._keys[owner].running
            if mine and mine + wanted > self._most_of_one(owner, limit, now_s):
                continue
            # Those behind it may not overtake it, or a large request would never begin.
            return request if running + wanted <= limit else None
        return None

    def _most_of_one(self, owner: str, limit: int, now_s: float) -> int:
        others = any(
            key.running or key.waiting or now_s - key.seen_s < self._rules.lately_s
            for name, key in self._keys.items()
            if name != owner
        )
        reserve = max(1, int(limit * self._rules.reserve_share)) if others and limit > 1 else 0
        return limit - reserve

    def _refused(self, key: _Key, wanted: int, limit: int) -> tuple[Why | None, float]:
        """Whether one more request of a key may not even wait, and how long it would."""
        if not self._waiting and self.running + wanted <= limit:
            return None, 0.0
        waits_s = self._predicted_wait_s(key, limit)
        if len(self._waiting) >= self._rules.waiting_max:
            return Why.QUEUE_FULL, waits_s
        if key.waiting >= self._rules.waiting_key_max:
            return Why.KEY_FULL, waits_s
        return (Why.TOO_LONG if waits_s > self._rules.wait_max_s else None), waits_s

    def _predicted_wait_s(self, key: _Key, limit: int) -> float:
        """Places come free at `limit / held` a second, and the keys that wait take turns."""
        if self._held_s is None:
            return 0.0
        keys_waiting = sum(1 for other in self._keys.values() if other.waiting and other is not key) + 1
        ahead = min(len(self._waiting) + 1, (key.waiting + 1) * keys_waiting)
        return ahead * self._held_s / max(1, limit)


def _mixed(mean: float, newest: float, weight: float) -> float:
    return mean + weight * (newest - mean)

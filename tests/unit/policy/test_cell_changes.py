"""Devices do not flap between cells, and cells do not dissolve into each other, in whatever order they hear what."""

import itertools
import random

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.domain.cells import CellDigest, ModelDigest
from fallow.domain.ids import Digest
from fallow.policy.cell_changes import Settled, Smallness, dissolving, look
from fallow.policy.cells import CellOffer, CellRules, Neighbour
from fallow.policy.enrolment import MOVE_EVERY_S

RULES = CellRules(devices_max=20, devices_min=6, small_for_s=10.0)
MODEL = Digest("a" * 64)


def offer(cell: str, rtt_s: float, devices: int = 1, dissolves_into: str | None = None) -> CellOffer:
    return CellOffer(cell=cell, rtt_s=rtt_s, devices=devices, devices_max=20, dissolves_into=dissolves_into)


# --- devices --------------------------------------------------------------------------------------


class Roamer:
    """A device that looks every ten minutes and does as it should."""

    def __init__(self, home: str) -> None:
        self.settled = Settled(home=home, since_s=0.0)
        self.now_s = 0.0
        self.moves: list[tuple[float, str]] = []

    def look(self, *offers: CellOffer) -> None:
        self.now_s += RULES.look_interval_s
        self.settled, cell = look(self.settled, offers, self.now_s, RULES)
        if cell is not None:
            self.moves.append((self.now_s, cell))
            self.settled = Settled(home=cell, since_s=self.now_s)


def test_a_device_moves_once_the_gain_was_clear_in_enough_looks_in_a_row() -> None:
    device = Roamer("far")
    for _ in range(10):  # two of three are never enough, however long it is there
        device.look(offer("far", 0.050), offer("near", 0.010))
        device.look(offer("far", 0.050), offer("near", 0.010))
        device.look(offer("far", 0.050), offer("near", 0.045))
    assert device.moves == []
    for _ in range(RULES.looks_agreeing):
        device.look(offer("far", 0.050), offer("near", 0.010))
    assert device.moves == [(device.now_s, "near")]


def test_a_device_that_has_just_come_stays_whatever_it_sees() -> None:
    device = Roamer("far")
    while device.now_s < RULES.stay_min_s - RULES.look_interval_s:
        device.look(offer("far", 0.050, dissolves_into="near"), offer("near", 0.010))
    assert device.moves == []
    device.look(offer("far", 0.050, dissolves_into="near"), offer("near", 0.010))
    assert [cell for _, cell in device.moves] == ["near"]


def test_when_its_cell_dissolves_a_device_goes_at_once_where_that_says_unless_another_is_clearly_nearer() -> None:
    dissolving_home = offer("home", 0.010, dissolves_into="heir")
    for others, expected in (
        ((offer("heir", 0.030), offer("other", 0.028)), "heir"),
        ((offer("heir", 0.030), offer("other", 0.012)), "other"),
        ((offer("heir", 0.030, devices=20), offer("other", 0.028)), None),
        ((offer("heir", 0.030, dissolves_into="other"), offer("other", 0.028)), None),
        ((), None),
    ):
        device = Roamer("home")
        device.now_s = 2 * RULES.stay_min_s
        device.look(dissolving_home, *others)
        assert [cell for _, cell in device.moves] == ([] if expected is None else [expected])


def test_a_device_whose_coordinator_is_away_for_a_moment_stays_and_one_that_hears_nobody_does_too() -> None:
    device = Roamer("home")
    for _ in range(20):
        device.look()
    for _ in range(20):
        device.look(offer("other", 0.010))
        device.look(offer("other", 0.010), offer("home", 0.010))
    assert device.moves == []
    for _ in range(RULES.looks_agreeing):
        device.look(offer("other", 0.010))
    assert [cell for _, cell in device.moves] == ["other"], "a cell without a coordinator is of no use to anybody"


LOOKS = st.lists(
    st.lists(
        st.builds(
            CellOffer,
            cell=st.sampled_from("abcd"),
            rtt_s=st.floats(0.0, 0.3),
            devices=st.integers(0, 25),
            devices_max=st.just(20),
            dissolves_into=st.sampled_from([None, None, "x", "y"]),
        ),
        max_size=4,
        unique_by=lambda each: each.cell,
    ),
    max_size=60,
)


@given(LOOKS)
def test_whatever_a_device_sees_it_moves_once_an_hour_at_most_and_to_open_cells_only(
    looks: list[list[CellOffer]],
) -> None:
    device = Roamer("a")
    for offers in looks:
        before = len(device.moves)
        device.look(*offers)
        for _, cell in device.moves[before:]:
            (chosen,) = (each for each in offers if each.cell == cell)
            assert chosen.devices < chosen.devices_max
            assert chosen.dissolves_into is None
    times_s = [0.0, *(at_s for at_s, _ in device.moves)]
    assert all(later - earlier >= RULES.stay_min_s for earlier, later in itertools.pairwise(times_s))
    assert RULES.stay_min_s >= MOVE_EVERY_S, "else the registrar would refuse"


@given(st.integers(0, 2**32), st.floats(0.0, 0.0024))
def test_jitter_below_the_hysteresis_moves_no_running_device(seed: int, jitter_s: float) -> None:
    draw = random.Random(seed)
    rtts_s = {cell: draw.uniform(0.005, 0.1) for cell in "abcd"}
    device = Roamer(min(rtts_s, key=lambda cell: rtts_s[cell]))
    for _ in range(60):
        device.look(*(offer(cell, rtt_s + draw.uniform(-jitter_s, jitter_s)) for cell, rtt_s in rtts_s.items()))
    assert device.moves == []


@given(st.integers(0, 2**32))
def test_spikes_of_any_size_that_come_in_one_look_of_three_move_nobody(seed: int) -> None:
    draw = random.Random(seed)
    device = Roamer("home")
    for index in range(60):
        spike_s = draw.uniform(0.0, 2.0) if index % 3 == 0 else 0.0
        device.look(offer("home", 0.010 + spike_s), offer("other", 0.009))
    assert device.moves == []


# --- cells ----------------------------------------------------------------------------------------


def digest(cell: str, devices: int, dissolves_into: str | None = None, *served: Digest) -> CellDigest:
    models = tuple(ModelDigest(model=model, servable=True) for model in served)
    return CellDigest(
        cell=cell, boot="1", sequence=1, devices=devices, devices_max=20, models=models, dissolves_into=dissolves_into
    )


def neighbour(told: CellDigest, rtt_s: float | None = 0.010) -> Neighbour:
    return Neighbour(digest=told, rtt_s=rtt_s)


SPOKE = Smallness(since_s=0.0, into="big")


def test_a_cell_dissolves_after_it_was_small_for_long_without_a_break() -> None:
    small, big = digest("small", 3), neighbour(digest("big", 9))
    state = Smallness()
    for now_s in range(10):
        state = dissolving(state, small, [big], float(now_s), RULES)
        assert state.into is None
    state = dissolving(state, digest("small", 6), [big], 9.5, RULES)
    for now_s in range(10, 20):
        state = dissolving(state, small, [big], float(now_s), RULES)
        assert state.into is None, "one moment at which it was large enough begins the time anew"
    assert dissolving(state, small, [big], 20.0, RULES).into == "big"


def test_a_word_that_was_given_holds_within_the_slack_and_no_further() -> None:
    room = int(RULES.merge_fill_max * RULES.hold_slack * RULES.devices_max)
    for own, big, holds in (
        (digest("small", 3), neighbour(digest("big", 9)), True),
        (digest("small", 0), neighbour(digest("big", 12)), True),
        (digest("small", 5), neighbour(digest("big", room - 5)), True),
        (digest("small", 5), neighbour(digest("big", room - 4)), False),
        (digest("small", 6), neighbour(digest("big", 9)), False),
        (digest("small", 3), neighbour(digest("big", 9), RULES.rtt_max_s * 1.19), True),
        (digest("small", 3), neighbour(digest("big", 9), RULES.rtt_max_s * 1.21), False),
        (digest("small", 3), neighbour(digest("big", 9), None), False),
        (digest("small", 3), neighbour(digest("other", 9)), False),
    ):
        assert dissolving(SPOKE, own, [big], 100.0, RULES) == (SPOKE if holds else Smallness()), (own, big)


def test_a_cell_dissolves_only_into_one_that_serves_what_is_served_here() -> None:
    serving = digest("small", 3, None, MODEL)
    assert dissolving(SPOKE, serving, [neighbour(digest("big", 9, None, MODEL))], 100.0, RULES) == SPOKE
    assert dissolving(SPOKE, serving, [neighbour(digest("big", 9))], 100.0, RULES) == Smallness()
    assert dissolving(Smallness(), serving, [neighbour(digest("big", 9))], 100.0, RULES) == Smallness()
    ready = Smallness(since_s=0.0)
    both = [neighbour(digest("big", 9)), neighbour(digest("far", 9, None, MODEL), 0.030)]
    assert dissolving(ready, serving, both, 100.0, RULES).into == "far"


def test_a_cell_that_dissolves_itself_is_nobodys_heir() -> None:
    going = neighbour(digest("big", 9, "third"))
    assert dissolving(Smallness(since_s=0.0), digest("small", 3), [going], 100.0, RULES) == Smallness()
    assert dissolving(SPOKE, digest("small", 3), [going], 100.0, RULES) == Smallness()


def test_of_two_that_spoke_at_once_the_lesser_name_keeps_its_word() -> None:
    into_b, into_a = digest("a", 3, "b"), digest("b", 3, "a")
    assert dissolving(Smallness(since_s=0.0, into="b"), into_b, [neighbour(into_a)], 100.0, RULES).into == "b"
    assert dissolving(Smallness(since_s=0.0, into="a"), into_a, [neighbour(into_b)], 100.0, RULES) == Smallness()
    # And so in a row of three: a into b, b into c.
    chain = digest("b", 3, "c")
    beside = [neighbour(into_b), neighbour(digest("c", 9))]
    assert dissolving(Smallness(since_s=0.0, into="c"), chain, beside, 100.0, RULES) == Smallness()
    # Who has said nothing yet says nothing while another counts on it.
    assert dissolving(Smallness(since_s=0.0), chain, beside, 100.0, RULES) == Smallness()


class Town:
    """Cells whose coordinators hear each other a little late, and whose devices do as they are told."""

    def __init__(self, draw: random.Random, sizes: dict[str, int]) -> None:
        self.draw = draw
        self.sizes = sizes
        self.at_s = {cell: draw.uniform(0.0, 0.05) for cell in sizes}
        self.states = {cell: Smallness() for cell in sizes}
        self.said: list[dict[str, CellDigest]] = [{cell: digest(cell, size) for cell, size in sizes.items()}] * 3
        self.now_s = 0.0
        self.changes: list[float] = []

    def words(self) -> dict[str, str]:
        return {cell: state.into for cell, state in self.states.items() if state.into is not None}

    def tick(self) -> None:
        self.now_s += 1.0
        told: dict[str, CellDigest] = {}
        for cell in self.draw.sample(sorted(self.sizes), len(self.sizes)):
            own = digest(cell, self.sizes[cell])
            heard = self.draw.choice(self.said[-3:])  # what the others told up to three ticks ago
            others = [
                neighbour(heard[other], abs(self.at_s[cell] - self.at_s[other])) for other in heard if other != cell
            ]
            before = self.states[cell]
            self.states[cell] = dissolving(before, own, others, self.now_s, RULES)
            if before.into != self.states[cell].into:
                self.changes.append(self.now_s)
            told[cell] = msgspec.structs.replace(own, dissolves_into=self.states[cell].into)
        self.said.append(told)

    def move_somebody(self) -> None:
        """One device of a dissolving cell looks, by the newest digests."""
        words = self.words()
        for cell, into in words.items():
            if self.sizes[cell] and into not in words and self.sizes[into] < RULES.devices_max:
                self.sizes[cell] -= 1
                self.sizes[into] += 1
                self.changes.append(self.now_s)
                return


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.dictionaries(st.sampled_from("abcde"), st.integers(0, 12), min_size=2))
def test_cells_come_to_rest_and_nobody_dissolves_into_one_that_dissolves(seed: int, sizes: dict[str, int]) -> None:
    draw = random.Random(seed)
    town = Town(draw, sizes)
    for _ in range(60):  # devices come and go by themselves
        cell = draw.choice(sorted(sizes))
        sizes[cell] = max(0, sizes[cell] + draw.choice((-1, 0, 1)))
        town.tick()
        town.move_somebody()
    devices, mutual_for = sum(sizes.values()), 0
    for _ in range(150):
        town.tick()
        town.move_somebody()
        words = town.words()
        mutual_for = mutual_for + 1 if any(words.get(into) == cell for cell, into in words.items()) else 0
        assert mutual_for <= 5, "two may say so at once, until they hear of each other"
    assert sum(sizes.values()) == devices
    assert not town.changes or town.changes[-1] < 150, "there is an end to it"
    words = town.words()
    assert not set(words.values()) & set(words)
    assert all(sizes[cell] == 0 for cell in words), "the devices have gone where they were told"

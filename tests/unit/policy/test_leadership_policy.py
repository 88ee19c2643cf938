"""Never two leaders, and always one soon: the policy against a bus and clocks that do their worst.

Method: three candidates play against a compare-and-set register whose own clock jumps, so that values vanish too early
or too late. Hypothesis draws the schedule: clocks at different rates, processes that are stopped, answers that are late
or lost, connections that break with or without a notice. After every event, at most one may act.
"""

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.policy.leadership import (
    Candidate,
    LeaseRules,
    Read,
    Standing,
    Wait,
    Write,
    after_disconnect,
    after_failure,
    after_hint,
    after_read,
    after_refusal,
    after_write,
    lapsed,
    may_act,
    next_step,
)

RULES = LeaseRules()
STEP_S = 0.05


class Register:
    """The key on the bus. Its clock is its own."""

    def __init__(self) -> None:
        self.revision = 0
        self.entry: Standing | None = None

    def write(self, holder: str | None, after: int, epoch: int = 0) -> int | None:
        if (self.entry.revision if self.entry else 0) != after:
            return None
        self.revision += 1
        self.entry = Standing(self.revision, holder, epoch)
        return self.revision


class Player:
    """A process: its clock, its connection, and what is under way."""

    def __init__(self, name: str, rate: float, origin_s: float) -> None:
        self.candidate = Candidate(me=name)
        self.rate, self.origin_s = rate, origin_s
        self.connection: int | None = 1
        self.connections = 1
        self.stopped_until_s = 0.0
        self.answers: list[tuple[float, object]] = []
        self.busy = False

    def now_s(self, real_s: float) -> float:
        return self.origin_s + real_s * self.rate


class World:
    """Everything, on real time that only the test knows."""

    def __init__(self, rates: list[float]) -> None:
        self.register = Register()
        self.players = [Player(f"p{i}", rate, 1000.0 * i) for i, rate in enumerate(rates)]
        self.real_s = 0.0
        self.delay_s = 0.0
        self.epochs: list[tuple[int, str]] = []

    def leaders(self) -> list[Player]:
        return [p for p in self.players if may_act(p.candidate, p.now_s(self.real_s), p.connection)]

    def run(self, for_s: float) -> None:
        until_s = self.real_s + for_s
        while self.real_s < until_s:
            self.real_s += STEP_S
            for player in self.players:
                self.play(player)
                self.check()

    def check(self) -> None:
        leaders = self.leaders()
        assert len(leaders) <= 1, f"two lead at {self.real_s:.2f}: {[p.candidate for p in leaders]}"

    def play(self, player: Player) -> None:
        if self.real_s < player.stopped_until_s:
            return
        now_s = player.now_s(self.real_s)
        due = [answer for at_s, answer in player.answers if at_s <= self.real_s]
        player.answers = [(at_s, answer) for at_s, answer in player.answers if at_s > self.real_s]
        for answer in due:
            player.busy = False
            self.fold(player, answer, now_s)
        player.candidate = lapsed(player.candidate, now_s)
        if player.busy:
            return
        had = player.candidate.term
        step = next_step(player.candidate, now_s, player.connection, RULES)
        match step:
            case Wait(until_s):
                assert until_s > now_s, "a wait passes time"
            case Read():
                entry = self.register.entry
                self.answer(player, ("read", entry))
            case Write(after):
                epoch = had.epoch if had is not None else 0
                assert player.connection is not None
                revision = self.register.write(player.candidate.me, after, epoch)
                self.answer(player, ("write", revision, now_s, player.connection))
                for other in self.players:
                    other.candidate = after_hint(other.candidate)

    def answer(self, player: Player, answer: object) -> None:
        player.busy = True
        player.answers.append((self.real_s + self.delay_s, answer))
        if self.delay_s == 0.0:
            self.play(player)

    def fold(self, player: Player, answer: object, now_s: float) -> None:
        before = player.candidate.term
        match answer:
            case ("read", entry):
                player.candidate = after_read(player.candidate, entry, now_s, RULES)
            case ("write", revision, sent_s, connection):
                player.candidate = after_write(player.candidate, revision, sent_s, now_s, connection, RULES)
            case "lost":
                player.candidate = after_failure(player.candidate, now_s, RULES)
        term = player.candidate.term
        if term is not None and before is None:
            assert all(term.epoch > epoch for epoch, _ in self.epochs), "epochs rise"
            self.epochs.append((term.epoch, player.candidate.me))

    # --- what may happen ---

    def lose_answers(self, player: Player) -> None:
        if player.busy:
            player.answers = [(self.real_s, "lost")]

    def break_connection(self, player: Player, told: bool) -> None:
        player.connection = None
        self.lose_answers(player)
        if told:
            for other in self.players:
                other.candidate = after_disconnect(other.candidate, player.candidate.me, other.now_s(self.real_s))

    def die(self, player: Player) -> None:
        """Another process in its place. One that starts just after a value vanished is what the policy excludes."""
        player.answers, player.busy = [], False
        player.candidate = Candidate(me=f"{player.candidate.me}'")
        if self.register.entry is None:
            player.stopped_until_s = max(player.stopped_until_s, self.real_s + 2 * RULES.ttl_s)

    def connect(self, player: Player) -> None:
        if player.connection is None:
            player.connections += 1
            player.connection = player.connections


events = st.lists(
    st.tuples(
        st.sampled_from(
            ["run", "stop", "break", "break untold", "connect", "lose", "slow", "fast", "vanish", "release", "die"]
        ),
        st.integers(0, 2),
        st.floats(0.05, 6.0),
    ),
    max_size=40,
)


@settings(deadline=None, derandomize=True, database=None, max_examples=300)
@given(rates=st.lists(st.floats(0.95, 1.05), min_size=3, max_size=3), script=events)
def test_never_two_and_soon_one(rates: list[float], script: list[tuple[str, int, float]]) -> None:
    world = World(rates)
    for event, index, amount_s in script:
        player = world.players[index]
        match event:
            case "run":
                world.run(amount_s)
            case "stop":
                player.stopped_until_s = world.real_s + 2 * amount_s
            case "break":
                world.break_connection(player, told=True)
            case "break untold":
                world.break_connection(player, told=False)
            case "connect":
                world.connect(player)
            case "lose":
                world.lose_answers(player)
            case "slow":
                world.delay_s = amount_s / 4
            case "fast":
                world.delay_s = 0.0
            case "vanish":  # the bus's clock jumped, or its store is lost
                if all(other.candidate.seen is not None for other in world.players):
                    world.register.entry = None
            case "release":
                now_s, term = player.now_s(world.real_s), player.candidate.term
                if may_act(player.candidate, now_s, player.connection) and term is not None and not player.busy:
                    world.register.write(None, term.revision)
                    world.die(player)
            case "die":
                world.die(player)
        world.check()
    world.delay_s = 0.0
    for player in world.players:
        player.stopped_until_s = 0.0
        world.connect(player)
    world.run(2 * RULES.ttl_s / min(rates) + RULES.renew_s)
    assert len(world.leaders()) == 1
    leader, before = world.leaders()[0], len(world.epochs)
    world.run(10.0)
    assert world.leaders() == [leader] and len(world.epochs) == before, "a calm leader stays"


def test_a_stopped_leader_is_followed_after_its_time_and_knows_it() -> None:
    world = World([1.0, 1.0, 1.0])
    world.run(2.0)
    (leader,) = world.leaders()
    leader.stopped_until_s = world.real_s + 10.0
    stopped_s = world.real_s
    while world.leaders() in ([], [leader]):
        world.run(STEP_S)
    took_s = world.real_s - stopped_s
    assert RULES.acts_s - RULES.renew_s < took_s <= RULES.ttl_s + 2 * STEP_S
    world.run(12.0)
    assert leader not in world.leaders()
    assert "took over" in leader.candidate.end or "not renewed" in leader.candidate.end


def test_a_leader_whose_connection_breaks_is_followed_at_once() -> None:
    world = World([1.0, 1.0, 1.0])
    world.run(2.0)
    (leader,) = world.leaders()
    world.break_connection(leader, told=True)
    world.run(2 * STEP_S)
    assert world.leaders() and leader not in world.leaders()


def test_who_comes_back_before_others_noticed_goes_on_in_the_same_term() -> None:
    world = World([1.0, 1.0, 1.0])
    world.run(2.0)
    (leader,) = world.leaders()
    epoch = leader.candidate.term.epoch  # type: ignore[union-attr]
    world.break_connection(leader, told=False)
    assert world.leaders() == []
    world.run(1.0)
    assert world.leaders() == [], "others wait for its time"
    world.connect(leader)
    world.run(2 * STEP_S)
    assert world.leaders() == [leader] and leader.candidate.term.epoch == epoch  # type: ignore[union-attr]


def test_an_answer_that_was_lost_is_not_mistaken_for_a_rival() -> None:
    candidate = after_read(Candidate(me="a"), None, 0.0, RULES)
    candidate = after_write(candidate, 7, 0.0, 0.0, 1, RULES)
    candidate = after_failure(candidate, 1.5, RULES)  # the renewal was carried out as revision 8
    assert next_step(candidate, 1.5, 1, RULES) == Wait(1.5 + RULES.retry_s)
    assert next_step(candidate, 1.8, 1, RULES) == Read()
    candidate = after_read(candidate, Standing(8, "a", 7), 1.8, RULES)
    assert next_step(candidate, 1.8, 1, RULES) == Write(8)
    candidate = after_write(candidate, 9, 1.8, 1.8, 1, RULES)
    assert candidate.term is not None and candidate.term.epoch == 7
    assert may_act(candidate, 1.8 + RULES.acts_s - 0.01, 1) and not may_act(candidate, 1.8 + RULES.acts_s, 1)


def test_who_hears_of_a_higher_epoch_steps_down_and_leads_again_above_it() -> None:
    candidate = after_write(after_read(Candidate(me="a"), None, 0.0, RULES), 7, 0.0, 0.0, 1, RULES)
    assert after_refusal(candidate, 7) == candidate
    candidate = after_refusal(candidate, 5_000)
    assert candidate.term is None and "5000" in candidate.end
    candidate = after_read(candidate, Standing(7, "a"), 0.1, RULES)
    assert next_step(candidate, 0.1, 1, RULES) == Write(7)
    candidate = after_write(candidate, 8, 0.1, 0.1, 1, RULES)
    assert candidate.term is not None and candidate.term.epoch == 5_001
    assert next_step(candidate, 0.1, 1, RULES) == Write(8), "the key must tell of the epoch"


def test_the_checks_can_fail() -> None:
    """Planted bug: a candidate that trusts the bus's clock takes a value that vanished early."""
    world = World([1.0, 1.0, 1.0])
    world.run(2.0)
    (leader,) = world.leaders()
    world.register.entry = None
    other = next(player for player in world.players if player is not leader)
    now_s = other.now_s(world.real_s)
    assert other.candidate.seen is not None
    eager = msgspec.structs.replace(other.candidate.seen, revision=0, free_at_s=now_s)
    other.candidate = msgspec.structs.replace(other.candidate, seen=eager, unread=False)
    world.play(other)
    assert len(world.leaders()) == 2

"""The plan, carried out on a model of the chain, always brings every stage and the gateway to the same point."""

from hypothesis import given
from hypothesis import strategies as st

from fallow.policy.recovery import Rewind, StagePosition, plan_recovery, valid_tokens, with_rewind

TOKENS_MAX = 40


@st.composite
def broken_chains(draw: st.DrawFn) -> tuple[int, int, list[StagePosition]]:
    """Any chain that can come to be: survivors at falling positions, newcomers at 0, logs cut anywhere."""
    tokens = draw(st.integers(0, TOKENS_MAX))
    valid = draw(st.integers(0, tokens))
    stages: list[StagePosition] = []
    upper = tokens
    for _ in range(draw(st.integers(1, 6))):
        if draw(st.booleans()):
            stages.append(StagePosition(0, 0, valid))
            continue
        position = draw(st.integers(0, upper))
        upper = position
        stages.append(StagePosition(position, draw(st.integers(0, position)), valid))
    received = draw(st.integers(0, min(valid, upper)))
    last = stages[-1]
    stages[-1] = StagePosition(last.position, last.position, valid)  # the last stage keeps no log
    return valid, received, stages


def carry_out(valid: int, received: int, stages: list[StagePosition]) -> tuple[list[list[int]], list[int]]:
    """Feed the plan through a literal model of the stages; the rows each stage computed, and the results that came."""
    plan = plan_recovery(received, stages)
    computed: list[list[int]] = []
    flowing = list(range(plan.feed_from, valid))
    for stage, todo in zip(stages, plan.stages, strict=True):
        position = stage.position if todo.rewind_to is None else todo.rewind_to
        assert position <= valid, "a stage keeps rows of tokens that no longer hold"
        logged = [row for row in range(stage.log_start, position) if row >= todo.forward_from]
        mine = []
        for row in flowing:
            if row < position:
                continue  # a duplicate, dropped
            assert row == position, f"a gap: row {row} came to a stage at {position}"
            mine.append(row)
            position += 1
        computed.append(mine)
        flowing = logged + [row for row in mine if row >= todo.forward_from]
    return computed, flowing


@given(broken_chains())
def test_every_stage_and_the_gateway_catch_up_without_a_gap(chain: tuple[int, int, list[StagePosition]]) -> None:
    valid, received, stages = chain
    _, results = carry_out(valid, received, stages)
    assert results == list(range(received, valid))


@given(broken_chains())
def test_a_survivor_with_its_log_computes_nothing_twice(chain: tuple[int, int, list[StagePosition]]) -> None:
    valid, received, stages = chain
    complete = [StagePosition(s.position, 0, valid) for s in stages[:-1]] + [stages[-1]]
    computed, _ = carry_out(valid, received, complete)
    for stage, rows in zip(complete[:-1], computed[:-1], strict=True):
        assert all(row >= min(stage.position, valid) for row in rows)


def test_one_lost_stage_is_rebuilt_from_its_predecessors_log() -> None:
    plan = plan_recovery(99, [StagePosition(100, 0, 100), StagePosition(0, 0, 100), StagePosition(99, 99, 100)])
    assert plan.feed_from == 100, "the gateway resends nothing"
    assert [stage.forward_from for stage in plan.stages] == [0, 99, 99]
    assert [stage.rewind_to for stage in plan.stages] == [None, None, None]


def test_a_log_that_was_cut_makes_its_stage_compute_again() -> None:
    plan = plan_recovery(99, [StagePosition(100, 60, 100), StagePosition(0, 0, 100), StagePosition(99, 99, 100)])
    assert plan.stages[0].rewind_to == 0
    assert plan.feed_from == 0


rewinds_drawn = st.lists(st.integers(0, 50), max_size=12).map(
    lambda positions: [Rewind(epoch, position) for epoch, position in enumerate(positions, start=1)]
)


@given(rewinds_drawn, st.integers(0, 13), st.integers(0, 60))
def test_what_is_remembered_of_rewinds_is_enough(rewinds: list[Rewind], flowed_epoch: int, fed: int) -> None:
    kept: tuple[Rewind, ...] = ()
    for rewind in rewinds:
        kept = with_rewind(kept, rewind)
    assert valid_tokens(fed, flowed_epoch, kept) == valid_tokens(fed, flowed_epoch, rewinds)


@given(rewinds_drawn, st.integers(0, 13), st.integers(0, 60))
def test_a_full_memory_of_rewinds_errs_on_the_safe_side(rewinds: list[Rewind], flowed_epoch: int, fed: int) -> None:
    kept: tuple[Rewind, ...] = ()
    for rewind in rewinds:
        kept = with_rewind(kept, rewind, rewinds_max=3)
        assert len(kept) <= 3
    assert valid_tokens(fed, flowed_epoch, kept) <= valid_tokens(fed, flowed_epoch, rewinds)

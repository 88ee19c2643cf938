"""The rules for hidden rows: what they were measured on passes, damage of many kinds does not, nothing raises."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.policy.activations import ENERGY_MARGIN, RowRules, measure

HIDDEN = 192


def rows(seed: int, count: int) -> np.ndarray:
    """Like a residual stream: channels of their own size, one outlier channel, and a sink now and then."""
    model, drawn = np.random.default_rng(7), np.random.default_rng(seed)
    centre, spread = model.standard_normal(HIDDEN), np.exp(model.standard_normal(HIDDEN) / 2)
    spread[5] = 40.0
    plain = centre + spread * drawn.standard_normal((count, HIDDEN))
    plain[::16, 9] += 5_000.0
    return plain.astype(np.float16)


RULES = RowRules(measure(rows(1, 512).astype(np.float32)))
SEEDS = st.integers(2, 1 << 30)


@given(SEEDS)
def test_rows_of_the_same_stream_pass_one_by_one_and_together(seed: int) -> None:
    sound = rows(seed, 48)
    assert RULES.complaint(sound) is None
    assert all(RULES.complaint(sound[i : i + 1]) is None for i in range(len(sound)))


@given(SEEDS, st.integers(0, 47), st.integers(0, HIDDEN - 1), st.sampled_from([np.inf, -np.inf, np.nan]))
def test_one_value_that_is_no_number_is_refused(seed: int, row: int, channel: int, value: float) -> None:
    damaged = rows(seed, 48)
    damaged[row, channel] = value
    assert RULES.complaint(damaged) is not None
    assert RULES.complaint(damaged[row : row + 1]) == "a row is not finite"


@given(SEEDS, st.integers(0, 47), st.integers(0, HIDDEN - 1))
def test_a_value_far_from_its_channel_is_refused_and_named(seed: int, row: int, channel: int) -> None:
    damaged = rows(seed, 48)
    damaged[row, channel] = 60_000.0
    complaint = RULES.complaint(damaged)
    assert complaint is not None and f"channel {channel} " in complaint


@given(SEEDS, st.sampled_from([16.0, 64.0]))
def test_a_row_of_another_scale_is_refused(seed: int, factor: float) -> None:
    damaged = rows(seed, 4)[1:]
    damaged *= np.float16(factor)
    assert RULES.complaint(damaged) is not None


@given(SEEDS, st.floats(0.1, 1.0))
def test_channels_that_are_zero_are_refused(seed: int, share: float) -> None:
    damaged = rows(seed, 3)
    damaged[1, : int(share * HIDDEN)] = 0.0
    assert "exactly zero" in (RULES.complaint(damaged) or "")


@settings(max_examples=200)
@given(st.binary(min_size=2 * HIDDEN, max_size=2 * HIDDEN))
def test_any_bytes_are_answered_without_an_error(raw: bytes) -> None:
    RULES.complaint(np.frombuffer(raw, np.float16).reshape(1, HIDDEN))


def test_sinks_are_a_kind_of_their_own_and_a_model_without_them_has_one() -> None:
    with_sinks, without = rows(1, 512).astype(np.float32), np.delete(rows(1, 512), slice(None, None, 16), axis=0)
    assert len(measure(with_sinks)) == 2
    [kind] = measure(without.astype(np.float32))
    assert RowRules([kind]).complaint(rows(3, 1)) is not None, "a sink is not like the other rows"
    assert kind.energy_max > ENERGY_MARGIN > kind.energy_min


def test_constant_channels_do_not_make_everything_else_impossible() -> None:
    still = rows(1, 256).astype(np.float32)
    still[:, 3] = 0.5
    rules = RowRules(measure(still))
    moved = still[1:2].copy()
    moved[0, 3] = 0.55
    assert rules.complaint(moved.astype(np.float16)) is None

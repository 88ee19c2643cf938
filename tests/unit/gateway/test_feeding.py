"""Frames to the first stage: of one phase, small while a cache is rebuilt, and every row once."""

from hypothesis import given
from hypothesis import strategies as st

from fallow.domain.frames import Phase
from fallow.gateway.feeding import CHUNK_ROWS, REBUILD_ROWS, count_to_feed


@given(st.lists(st.sampled_from(Phase), min_size=1, max_size=300), st.integers(0, 300))
def test_frames_cover_all_rows_and_mix_neither_phases_nor_old_and_new(phases: list[Phase], rebuilt_to: int) -> None:
    fed = 0
    while fed < len(phases):
        count = count_to_feed(phases, fed, rebuilt_to)
        assert 1 <= count <= (REBUILD_ROWS if fed < rebuilt_to else CHUNK_ROWS)
        assert len(set(phases[fed : fed + count])) == 1
        assert not fed < rebuilt_to < fed + count
        fed += count
    assert fed == len(phases)

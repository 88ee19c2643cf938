"""The log against a plain list of rows."""

from hypothesis import given
from hypothesis import strategies as st

from fallow.domain.frames import Phase
from fallow.node.activation_log import REPLAY_ROWS_PER_FRAME, ActivationLog, LoggedRows

ROW_BYTES = 4

operations = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 300), st.sampled_from(Phase)),
        st.tuples(st.just("rewind"), st.integers(0, 900), st.none()),
        st.tuples(st.just("drop"), st.integers(0, 3), st.none()),
    ),
    max_size=12,
)


def row(position: int, version: int) -> bytes:
    return position.to_bytes(2, "little") + version.to_bytes(2, "little")


@given(operations, st.integers(0, 900))
def test_replay_gives_back_the_rows_that_are_held(steps: list[tuple[str, int, Phase | None]], replay_from: int) -> None:
    log = ActivationLog()
    held: dict[int, tuple[bytes, Phase]] = {}
    end = 0
    for version, (kind, amount, phase) in enumerate(steps):
        if kind == "append":
            assert phase is not None
            rows = {position: row(position, version) for position in range(end, end + amount)}
            log.append(LoggedRows(end, amount, phase, 0, 1, b"".join(rows.values())))
            held |= {position: (data, phase) for position, data in rows.items()}
            end += amount
        elif kind == "rewind":
            log.rewind(amount)
            held = {position: item for position, item in held.items() if position < amount}
            end = min(end, amount)
        else:
            for _ in range(amount):
                log.drop_oldest()
            held = {position: item for position, item in held.items() if position >= log.start}
    assert log.end == end
    assert log.size_bytes == len(held) * ROW_BYTES
    seen: dict[int, tuple[bytes, Phase]] = {}
    for frame in log.replay(replay_from):
        assert 0 < frame.count <= max(REPLAY_ROWS_PER_FRAME, 300)
        data = bytes(frame.payload)
        for index in range(frame.count):
            seen[frame.position + index] = (data[index * ROW_BYTES : (index + 1) * ROW_BYTES], frame.phase)
    assert seen == {position: item for position, item in held.items() if position >= replay_from}
    assert list(seen) == sorted(seen)


def test_a_hole_is_refused() -> None:
    log = ActivationLog()
    log.append(LoggedRows(0, 1, Phase.DECODE, 0, 1, b"1234"))
    try:
        log.append(LoggedRows(2, 1, Phase.DECODE, 0, 1, b"1234"))
    except ValueError as error:
        assert "ends at 1" in str(error)
    else:
        raise AssertionError("the log has a hole")

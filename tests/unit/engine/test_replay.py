"""The room in which a cache is rebuilt: images on the same memory, for as long as the rebuild lasts."""

import numpy as np
import pytest
from engine_world import Driver, family, name_of, step_of

from fallow.domain.errors import EngineError
from fallow.domain.frames import Phase
from fallow.domain.model import Quantisation, Span
from fallow.engine import replay
from fallow.engine.replay import CAPACITY_MIN, IMAGES, Room

SLOTS, HEADS, LENGTH, HEAD_DIM = 2, 2, 1024, 32


def caches():
    drawn = np.random.default_rng(0)
    return {each: drawn.standard_normal((SLOTS, HEADS, LENGTH, HEAD_DIM)).astype(np.float32) for each in ("k0", "v0")}


def test_what_one_image_is_given_all_others_have():
    room = Room(caches(), 10)
    try:
        assert set(room.images) == {"k0", "v0"}
        assert room.images["k0"].shape == (IMAGES, HEADS, CAPACITY_MIN, HEAD_DIM)
        room.images["k0"][3, :, 7] = 5.0
        assert all(np.all(image[:, 7] == 5.0) for image in room.images["k0"])
        assert not np.any(room.images["v0"][:, :, 7])
    finally:
        room.close()


def test_tokens_come_from_the_slot_and_go_back_to_it_and_to_no_other():
    stored = caches()
    before = {each: cache.copy() for each, cache in stored.items()}
    room = Room(stored, 300)
    try:
        assert room.capacity == 512
        room.load(1, 20)
        for each, cache in before.items():
            assert np.array_equal(room.images[each][IMAGES - 1, :, :20], cache[1, :, :20])
            room.images[each][0, :, 20:23] = 9.0
        room.keep(1, 20, 22)
        for each, cache in stored.items():
            assert np.all(cache[1, :, 20:22] == 9.0)
            cache[1, :, 20:22] = before[each][1, :, 20:22]
            assert np.array_equal(cache, before[each])
    finally:
        room.close()
        room.close()


@pytest.mark.parametrize(("tokens", "capacity"), [(1, 256), (256, 256), (257, 512), (600, 1024), (1000, 1024)])
def test_a_room_has_the_next_power_of_two_and_never_more_than_a_slot(tokens, capacity):
    room = Room(caches(), tokens)
    assert room.capacity == capacity
    room.close()


def test_a_system_without_memory_is_an_error_of_the_engine(monkeypatch):
    def full(*_):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(replay, "_map_images", full)
    with pytest.raises(EngineError, match="Cannot allocate memory"):
        Room(caches(), 10)


TEXT = [int(token) for token in np.random.default_rng(1).integers(0, 90, 40)]


def test_two_sessions_rebuilt_in_turns_have_the_bits_of_rows_computed_alone():
    model = family("llama", Quantisation.Q8)
    alone, together = Driver(model.hosted(Span(0, 1), Span(1, 4))), Driver(model.hosted(Span(0, 1), Span(1, 4)))
    rebuilt = dict.fromkeys((1, 2), b"")
    for number in rebuilt:
        for driver in (alone, together):
            driver.core.open(name_of(number), model.digest, model.whole, 64)
    wanted = {
        number: b"".join(
            bytes(alone.run(step_of(name_of(number), at, [TEXT[at + number]], Phase.DECODE))[0].payload)
            for at in range(30)
        )
        for number in rebuilt
    }
    for at in range(0, 30, 10):
        for number in rebuilt:
            rows = TEXT[at + number : at + number + 10]
            [stepped] = together.run(step_of(name_of(number), at, rows, Phase.DECODE))
            rebuilt[number] += bytes(stepped.payload)
    assert rebuilt == wanted


def test_a_room_stays_for_the_rebuild_and_goes_when_the_engine_turns_to_something_else():
    model = family("llama", Quantisation.Q8)
    driver = Driver(model.hosted())
    piece = next(iter(driver.core._models.values())).pieces[0]
    driver.core.open(name_of(1), model.digest, model.whole, 64)
    driver.run(step_of(name_of(1), 0, TEXT[:10], Phase.DECODE))
    room = piece._room
    assert room is not None
    driver.run(step_of(name_of(1), 10, TEXT[10:20], Phase.DECODE))
    assert piece._room is room
    driver.run(step_of(name_of(1), 20, TEXT[20:21], Phase.DECODE))
    assert piece._room is None
    assert room.images == {}

"""The array kernels of placement, against plain loops over drawn cells."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.policy import coverage
from fallow.policy.coverage import Floats

PARTS_MAX = 6
Device = tuple[int, int, float]
"""First part, last part (not included), layers a second."""


@st.composite
def cells_drawn(draw: st.DrawFn) -> tuple[Floats, list[list[Device]]]:
    """The work of each part, and the devices of one to three cells."""
    parts = draw(st.integers(1, PARTS_MAX))
    work = np.array(draw(st.lists(st.floats(0.5, 8), min_size=parts, max_size=parts)))
    device = st.tuples(st.integers(0, parts - 1), st.integers(1, parts), st.floats(0.1, 100)).map(
        lambda drawn: (drawn[0], min(drawn[0] + drawn[1], parts), drawn[2])
    )
    return work, draw(st.lists(st.lists(device, max_size=8), min_size=1, max_size=3))


def booked(work: Floats, cells: list[list[Device]]) -> tuple[Floats, Floats]:
    mass, count = (coverage.empty_mass(len(cells), len(work)) for _ in range(2))
    devices = [(cell, *device) for cell, held in enumerate(cells) for device in held]
    if devices:
        cell, first, last, speed = (np.array(column) for column in zip(*devices, strict=True))
        coverage.add_spans(mass, count, cell, first, last, speed.astype(np.float64))
    return mass, count


@settings(max_examples=80, deadline=None)
@given(drawn=cells_drawn())
def test_coverage_and_holders_are_what_a_loop_finds(drawn: tuple[Floats, list[list[Device]]]) -> None:
    work, cells = drawn
    mass, count = booked(work, cells)
    for cell, devices in enumerate(cells):
        for part in range(len(work)):
            over = [device for device in devices if device[0] <= part < device[1]]
            expected = sum(speed / work[first:last].sum() for first, last, speed in over)
            assert coverage.coverage(mass, work)[cell, part] == pytest.approx(expected)
            assert round(coverage.holders(count)[cell, part]) == len(over)


@settings(max_examples=80, deadline=None)
@given(drawn=cells_drawn())
def test_the_bottleneck_is_the_thinnest_set_of_parts(drawn: tuple[Floats, list[list[Device]]]) -> None:
    work, cells = drawn
    mass, _ = booked(work, cells)
    found = coverage.bottleneck(mass, work)
    parts = range(len(work))
    for cell, devices in enumerate(cells):
        sets = [chosen for size in parts for chosen in itertools.combinations(parts, size + 1)]
        ratios = [
            sum(speed for first, last, speed in devices if any(first <= part < last for part in chosen))
            / work[list(chosen)].sum()
            for chosen in sets
        ]
        assert found.rows_per_s[cell] == pytest.approx(min(ratios), abs=1e-9)
        assert coverage.coverage(mass, work)[cell].min() <= found.rows_per_s[cell] + 1e-9


@settings(max_examples=40, deadline=None)
@given(drawn=cells_drawn())
def test_devices_that_go_leave_nothing_behind(drawn: tuple[Floats, list[list[Device]]]) -> None:
    work, cells = drawn
    mass, count = booked(work, cells)
    for cell, devices in enumerate(cells):
        for first, last, speed in devices:
            one = (np.array([cell]), np.array([first]), np.array([last]), np.array([speed]))
            coverage.add_spans(mass, count, *one, sign=-1)
    assert np.abs(mass).max() < 1e-9
    assert np.abs(count).max() == 0


@settings(max_examples=80, deadline=None)
@given(drawn=cells_drawn(), data=st.data())
def test_a_device_joins_where_it_earns_most_and_only_where_it_fits(
    drawn: tuple[Floats, list[list[Device]]], data: st.DataObject
) -> None:
    work, cells = drawn
    parts = len(work)
    mass, count = booked(work, cells)
    width = np.array(data.draw(st.lists(st.integers(0, parts), min_size=len(cells), max_size=len(cells))))
    reach = coverage.reach_by_width(width, parts)
    price = coverage.prices(coverage.coverage(mass, work), coverage.holders(count), 2)
    starts = coverage.thinnest_start(price, reach, work)
    for cell, start in enumerate(starts):
        if width[cell] == 0:
            assert start == coverage.NOWHERE
            continue
        earned = [
            (price[cell, first : reach[cell, first]] * work[first : reach[cell, first]]).sum()
            / work[first : reach[cell, first]].sum()
            for first in range(parts - min(width[cell], parts) + 1)
        ]
        assert start < len(earned), "a span at the end that is part of another one is never better"
        assert earned[start] >= max(earned) * (1 - 1e-9)
        alone = coverage.thinnest_start(price[cell : cell + 1], reach[cell : cell + 1], work)
        assert alone[0] == start, "a cell's answer does not depend on its neighbours"


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 50), min_size=1, max_size=PARTS_MAX),
    rooms=st.lists(st.integers(0, 150), min_size=1, max_size=3),
)
def test_reach_is_as_far_as_the_room_goes(sizes: list[int], rooms: list[int]) -> None:
    reach = coverage.reach_by_room(np.array(sizes, dtype=np.float64), np.array(rooms, dtype=np.float64))
    for cell, room in enumerate(rooms):
        for first in range(len(sizes)):
            fitting = [last for last in range(first, len(sizes) + 1) if sum(sizes[first:last]) <= room]
            assert reach[cell, first] == max(fitting)


@settings(max_examples=60, deadline=None)
@given(drawn=cells_drawn())
def test_no_placement_goes_through_the_roof(drawn: tuple[Floats, list[list[Device]]]) -> None:
    """The roof knows of each device only how wide its span may be; where the spans really lie cannot beat it."""
    work, cells = drawn
    mass, _ = booked(work, cells)
    for cell, devices in enumerate(cells):
        speed = np.array([device[2] for device in devices])
        widest = np.array([work[first:last].sum() for first, last, _ in devices])
        assert coverage.bottleneck(mass, work).rows_per_s[cell] <= coverage.roof(speed, widest, work) * (1 + 1e-5)


def test_copies_come_before_thinness() -> None:
    covered = np.array([[1e-6, 1e6, 1e6, 5.0]])
    price = coverage.prices(covered, np.array([[2.0, 1.0, 0.0, 2.0]]), 2)[0]
    assert price[2] > price[1] > price[0] > price[3]

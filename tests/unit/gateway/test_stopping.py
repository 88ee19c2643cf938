"""Stop strings: whatever the pieces, the text ends where a look at the whole text says."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from fallow.gateway.stopping import StopScanner

LETTERS = st.text("ab", max_size=40)
STOPS = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4)


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """By definition: the first place where any stop string is complete; the longest of those that end there."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


def pieces(text: str, cuts: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in itertools.pairwise(edges)]


@given(LETTERS, STOPS, st.lists(st.integers(0, 100), max_size=10))
def test_shown_text_is_the_text_before_the_first_stop(text: str, stops: list[str], cuts: list[int]) -> None:
    scanner = StopScanner(stops)
    shown = "".join(scanner.feed(piece) for piece in pieces(text, cuts))
    expected, stopped = cut(text, stops)
    assert scanner.stopped == stopped
    assert shown + scanner.finish() == expected


@given(LETTERS, STOPS)
def test_no_more_is_held_back_than_could_become_a_stop(text: str, stops: list[str]) -> None:
    scanner = StopScanner(stops)
    shown = ""
    for end, character in enumerate(text, start=1):
        shown += scanner.feed(character)
        if scanner.stopped:
            return
        held = text[len(shown) : end]
        assert text.startswith(shown)
        assert not held or any(stop.startswith(held) for stop in stops)
        assert not any(stop.startswith(text[start:end]) for start in range(len(shown)) for stop in stops)


def test_nothing_is_shown_after_a_stop() -> None:
    scanner = StopScanner(["END"])
    assert scanner.feed("aEN") == "a"
    assert scanner.feed("Db") == ""
    assert scanner.feed("more") == scanner.finish() == ""

"""Stop strings across token borders.

`StopScanner` is fed text and gives back what may be shown: it keeps back the longest end that could still become a
stop string. The first stop string to be complete ends the text; it is not shown, and of two that are complete at the
same character the longer one counts. Knuth-Morris-Pratt automata, one a stop string: constant work a character, and
a bound on what is held back that does not depend on what the model says. It knows no tokens.
"""

from collections.abc import Sequence


class StopScanner:
    """Scans one choice's text. Stop strings are not empty."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._automata = [_Automaton(stop) for stop in stops]
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """Add text; returns what is now certain to come before any stop string. Nothing after a stop."""
        if self.stopped:
            return ""
        if not self._automata:
            return text
        pending = self._held + text
        for offset, character in enumerate(text, start=len(self._held) + 1):
            longest = 0
            for automaton in self._automata:
                if automaton.advance(character):
                    longest = max(longest, automaton.length)
            if longest:
                self.stopped = True
                self._held = ""
                return pending[: offset - longest]
        hold = max(automaton.matched for automaton in self._automata)
        shown = pending[: len(pending) - hold]
        self._held = pending[len(pending) - hold :]
        return shown

    def finish(self) -> str:
        """The text ended without a stop string: what was held back."""
        held, self._held = self._held, ""
        return held


class _Automaton:
    """How much of one stop string the text ends with."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self.length = len(pattern)
        self._fallback = _borders(pattern)
        self.matched = 0

    def advance(self, character: str) -> bool:
        while self.matched and self._pattern[self.matched] != character:
            self.matched = self._fallback[self.matched - 1]
        if self._pattern[self.matched] == character:
            self.matched += 1
        return self.matched == self.length


def _borders(pattern: str) -> list[int]:
    """For each prefix, the length of its longest proper prefix that is also its end."""
    borders = [0] * len(pattern)
    length = 0
    for index in range(1, len(pattern)):
        while length and pattern[index] != pattern[length]:
            length = borders[length - 1]
        if pattern[index] == pattern[length]:
            length += 1
        borders[index] = length
    return borders

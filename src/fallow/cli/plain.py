"""Words from outside, printed so that they are only words: names, reasons and answers that strangers chose.

Rules
- A character that acts instead of being seen (control characters, changes of writing direction, what has no width,
  half of a pair) is shown as `\\uXXXX`: as JSON writes it, so that JSON that is printed says what it said before.
- `one_line` is for a word inside a sentence or a table: a line break in it would begin a line that somebody takes for
  ours. `visible` keeps line breaks and tabs, for a whole text.
- `PlainConsole` reads no markup, colours no words, and lets nothing but the `visible` reach the terminal, whoever made
  the text: what styles and moves the cursor comes from this program alone.
"""

import re
from collections.abc import Iterable
from typing import Any, Final

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

_ACTS: Final = (
    r"\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    r"\ud800-\udfff\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"
)
"""The joiners U+200C and U+200D are left: names in Persian and families of emoji are written with them."""
_ACTING: Final = re.compile(f"[{_ACTS}]")
_ACTING_OR_BREAKING: Final = re.compile(rf"[\t\n{_ACTS}]")


def visible(text: str) -> str:
    """A text whose every character is seen, but for its line breaks and tabs."""
    return _ACTING.sub(_escaped, text)


def one_line(text: str) -> str:
    """The same on one line."""
    return _ACTING_OR_BREAKING.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    units = match[0].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at : at + 2].hex()}" for at in range(0, len(units), 2))


class PlainConsole(Console):
    """A console that prints words as they are, or visibly altered."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, highlight=False, emoji=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Every piece of text passes here on its way to the terminal; what is not text is ours."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))

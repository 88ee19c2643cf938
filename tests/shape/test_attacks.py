"""The suite of attacks: each says what is tried, what should happen, and what must stay unharmed."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.shape.repository import ROOT, parsed

ATTACKS_MIN = 40
LINES = ("Attack:", "Expected:", "Unharmed:")
CONTROL = "No attack:"
"""How the docstring of a test begins that shows the same parties with nobody attacking."""
FILES = sorted((ROOT / "tests" / "adversarial").glob("**/test_*.py"))

Test = ast.FunctionDef | ast.AsyncFunctionDef


def functions_of(file: Path) -> Iterator[Test]:
    """Test functions of a file, wherever pytest finds them."""
    for node in ast.walk(parsed(file)):
        if isinstance(node, Test) and node.name.startswith("test_"):
            yield node


def is_control(test: Test) -> bool:
    return (ast.get_docstring(test) or "").startswith(CONTROL)


EVERY = [(file, test) for file in FILES for test in functions_of(file)]


@pytest.mark.parametrize(("file", "test"), EVERY, ids=[f"{file.stem}-{test.name}" for file, test in EVERY])
def test_an_attack_says_what_is_tried_expected_and_unharmed(file: Path, test: Test) -> None:
    if is_control(test):
        return
    lines = [line.strip() for line in (ast.get_docstring(test) or "").splitlines()]
    for opening in LINES:
        said = [line for line in lines if line.startswith(opening)]
        assert len(said) == 1, f"{file.name}: {test.name} should have one line that begins {opening!r}"
        assert said[0] != opening, f"{file.name}: {test.name} says nothing after {opening!r}"
    places = [next(index for index, line in enumerate(lines) if line.startswith(opening)) for opening in LINES]
    assert places == sorted(places)


def test_there_are_enough_attacks() -> None:
    """By name: the cases of one that is parametrised count once."""
    names = [test.name for _, test in EVERY if not is_control(test)]
    assert len(names) >= ATTACKS_MIN
    assert len(set(names)) == len(names), "two attacks have one name"

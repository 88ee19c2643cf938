"""The fuzzers in short: what was ever found is tried again, then a few hundred inputs for each target.

Goal: strangers' bytes end in a value or a named error. Method: tests/fuzz/corpus.py. Seed: fixed here; `make fuzz`
goes on for ten minutes from others.
"""

import pytest

from tests.fuzz.__main__ import SEEDS, fuzz_once, probe
from tests.fuzz.targets import targets

EXAMPLES = 200
TARGETS = targets()


@pytest.mark.parametrize("name", TARGETS)
def test_broken_input_ends_in_a_named_error(name: str) -> None:
    finding = fuzz_once(TARGETS[name], 1, EXAMPLES)
    if finding is not None:
        raise finding


def test_what_was_found_once_stays_mended() -> None:
    for path in sorted(SEEDS.glob("*/*")):
        probe(TARGETS[path.parent.name], path.read_bytes())

"""Fuzz for a while: `python -m tests.fuzz --minutes 10`.

Every target in turn, with seeds of Hypothesis's that were not used before in this run. A finding is shrunk, said, and
kept in tests/fuzz/seeds/, where every test run tries it again for ever.
"""

import argparse
import hashlib
import sys
import time
import traceback
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from fallow.domain.errors import FallowError
from tests.fuzz.corpus import mutated
from tests.fuzz.targets import Target, targets

SEEDS = Path(__file__).parent / "seeds"
EXAMPLES = 1_000
"""Of one target before it is the next one's turn."""


class Finding(Exception):
    """Bytes for which a target raised something that is no named error."""

    def __init__(self, data: bytes, error: BaseException) -> None:
        super().__init__(f"{type(error).__name__}: {error}")
        self.data = data
        self.error = error


def probe(target: Target, data: bytes) -> None:
    """Raises `Finding` when a target answers with anything but a named error."""
    try:
        target.run(data)
    except FallowError:
        return
    except Exception as error:
        raise Finding(data, error) from error


def fuzz_once(target: Target, number: int, examples: int = EXAMPLES) -> Finding | None:
    """Some examples from a seed; the smallest finding, if any, where the profile allows the time for that."""
    phases = [phase for phase in (Phase.generate, Phase.shrink) if phase in settings.default.phases]

    @seed(number)
    @settings(
        max_examples=examples, deadline=None, database=None, phases=phases,
        suppress_health_check=list(HealthCheck), report_multiple_bugs=False, print_blob=False,
    )  # fmt: skip
    @given(mutated(target.seeds))
    def examine(data: bytes) -> None:
        probe(target, data)

    try:
        examine()
    except Finding as finding:
        return finding
    return None


def main() -> None:
    """Exit with 1 when there was a finding."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0, help="the first of Hypothesis's seeds")
    parser.add_argument("--only", help="one target")
    arguments = parser.parse_args()
    every = {name: target for name, target in targets().items() if arguments.only in (None, name)}
    end_s = time.monotonic() + 60 * arguments.minutes
    tried = dict.fromkeys(every, 0)
    findings = 0
    number = arguments.seed
    while time.monotonic() < end_s:
        for name, target in every.items():
            finding = fuzz_once(target, number)
            tried[name] += EXAMPLES
            if finding is not None:
                findings += 1
                place = SEEDS / name / hashlib.sha256(finding.data).hexdigest()[:16]
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(finding.data)
                print(f"{name}: {finding}; kept as {place.name}")
                traceback.print_exception(finding.error)
            if time.monotonic() > end_s:
                break
        number += 1
    for name, count in tried.items():
        print(f"{name:18} {count:>9,} inputs")
    print(f"{sum(tried.values()):,} inputs in {arguments.minutes:g} minutes, {findings} findings")
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()

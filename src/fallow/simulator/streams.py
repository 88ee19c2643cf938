"""Randomness from one seed, through named streams that do not shift each other.

A new use of randomness is a new name; what others draw stays as it was. The numbers depend on nothing but the seed and
the name: not on the process, the platform or `PYTHONHASHSEED`.
"""

import random
from hashlib import blake2b


def number(seed: int, *names: str) -> int:
    """64 bits for a seed and a name."""
    return int.from_bytes(blake2b("\0".join((str(seed), *names)).encode(), digest_size=8).digest(), "little")


class Streams:
    """The streams of one run."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def stream(self, *names: str) -> random.Random:
        """A generator of its own. The same names give the same numbers again."""
        return random.Random(number(self.seed, *names))  # noqa: S311 (nothing secret here)

    def node_id(self, *names: str) -> str:
        """64 lower-case hex digits, as a public key has."""
        return blake2b("\0".join((str(self.seed), "node", *names)).encode(), digest_size=32).hexdigest()

"""Inputs for the fuzzers: valid ones as a beginning, and Hypothesis's hand that breaks them.

A mutation keeps most of an input as it was, so that it comes past the first check: bits flip, pieces move, vanish, come
twice or come from another input, and numbers become the ones that break arithmetic.
"""

import re
from collections.abc import Sequence

from hypothesis import strategies as st

MUTATIONS_MAX = 6
PIECE_MAX_BYTES = 64
NUMBERS = (b"0", b"-1", b"1e999", b"-0.0", b"NaN", b"18446744073709551616", b"9223372036854775807", b"0.1", b"true")
TOKENS = (b"null", b"[]", b"{}", b'""', b"\xff\xfe", b"[" * 300, b'"' + b"\xf0\x9f\xa6\x8a" * 20 + b'"', b"\x00", b"}")
_NUMBER = re.compile(rb"-?[0-9]+(?:\.[0-9]+)?")
_VALUE = re.compile(rb'"[^"]*"|null|true|false|\[\]|\{\}')


@st.composite
def mutated(draw: st.DrawFn, seeds: Sequence[bytes]) -> bytes:
    """One of `seeds` with a few things wrong with it, or plain noise."""
    if draw(st.integers(0, 19)) == 0:
        return draw(st.binary(max_size=512))
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, MUTATIONS_MAX))):
        place = draw(st.integers(0, max(len(data) - 1, 0)))
        length = draw(st.integers(1, PIECE_MAX_BYTES))
        match draw(st.integers(0, 8)):
            case 0 if data:
                data[place] ^= 1 << draw(st.integers(0, 7))
            case 1:
                data[place : place + length] = draw(st.binary(max_size=length))
            case 2:
                del data[place : place + length]
            case 3:
                data[place:place] = data[place : place + length]
            case 4:
                other = draw(st.sampled_from(seeds))
                start = draw(st.integers(0, max(len(other) - 1, 0)))
                data[place : place + length] = other[start : start + length]
            case 5:
                _replace(draw, data, _NUMBER, NUMBERS)
            case 6:
                _replace(draw, data, _VALUE, TOKENS)
            case 7:
                del data[place:]
            case _:
                data[place:place] = draw(st.sampled_from(TOKENS))
    return bytes(data)


def _replace(draw: st.DrawFn, data: bytearray, what: re.Pattern[bytes], by: Sequence[bytes]) -> None:
    found = [match.span() for match in what.finditer(bytes(data))]
    if found:
        first, last = draw(st.sampled_from(found))
        data[first:last] = draw(st.sampled_from(by))

"""How much of a conversation a follow-up turn shares with it."""

from collections.abc import Sequence


def common_prefix(kept: Sequence[int], prompt: Sequence[int]) -> int:
    """The number of leading tokens that two sequences share."""
    length = min(len(kept), len(prompt))
    if list(kept[:length]) == list(prompt[:length]):
        return length
    low, high = 0, length
    while high - low > 1:
        middle = (low + high) // 2
        if list(kept[low:middle]) == list(prompt[low:middle]):
            low = middle
        else:
            high = middle
    return low

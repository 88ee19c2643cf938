"""Numbers of bytes as people write them."""

import re
from typing import Final

SIZE_MAX_BYTES: Final = 1 << 80


def parse_size(text: str) -> int:
    """Bytes in a size such as `2GiB`, `512 MiB` or `1e9`. Raises `ValueError`."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?(?:e[0-9]+)?)\s*([KMGT]i?B?|B)?\s*", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"expected a size such as 512MiB or 2GiB, got {text!r}")
    unit = (match[2] or "B").upper()
    exponent = "BKMGT".index(unit[0])
    base = 1024 if "I" in unit or unit in "KMGT" else 1000
    size = float(match[1]) * base**exponent
    if size >= SIZE_MAX_BYTES:
        raise ValueError(f"expected a size below {SIZE_MAX_BYTES} bytes, got {text!r}")
    return int(size)

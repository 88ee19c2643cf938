"""Logits near the top, once more in float32: which token is the most likely must not hang on the head's 8-bit input.

The head's kernel rounds its input like any other, and its error goes straight into the choice: with an exact head one
first choice in a hundred is another (`docs/adr/0005-activation-precision.md`). Tokens that are within `MARGIN_NATS` of
the highest logit are few, and their rows of the matrix are read and multiplied here, in float32.

A row's result depends on that row alone: no BLAS, whose sums change with the shape, and one row at a time.
"""

import numpy as np
from numpy.typing import NDArray

from fallow.engine.head import top_ids
from fallow.models.quantise import Q8_ZERO

MARGIN_NATS = 4.0
"""A token further down has less than a fiftieth of the first one's probability; the kernel errs by half a nat at most
(measured: 0.06 rms, 0.5 at worst)."""
RESCORED_MAX = 128
"""The highest so many, where more are within the margin: bounds the time for a row of a model that is unsure."""

Floats = NDArray[np.float32]


class Rescorer:
    """An 8-bit output matrix: codes uint8 `[V, H / 32, 32]`, scales float32 `[V, H / 32]`, read where needed."""

    def __init__(self, codes: NDArray[np.uint8], scales: Floats) -> None:
        self._codes = codes
        self._scales = scales

    def rescore(self, logits: Floats, normed: Floats) -> None:
        """Replace the highest of `logits [V]`, computed from `normed [H]`. Not finite ones are left as they are."""
        highest = logits.max()
        if not np.isfinite(highest):
            return
        ids = np.flatnonzero(logits >= highest - np.float32(MARGIN_NATS))
        if len(ids) > RESCORED_MAX:
            ids = top_ids(logits, RESCORED_MAX)
        blocks = normed.reshape(self._scales.shape[1], -1)
        products = np.einsum("cbk,bk->cb", self._codes[ids].astype(np.float32), blocks)
        products -= np.float32(Q8_ZERO) * blocks.sum(axis=1)
        products *= self._scales[ids]
        logits[ids] = products.sum(axis=1)

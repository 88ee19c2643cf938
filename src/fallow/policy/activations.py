"""Which hidden rows can be believed: rules that a receiving stage holds against what its predecessor sends. Pure.

The residual stream at a cut point has a shape that no text changes: every channel has its own centre and spread, and a
row that stands for the start of a sequence (an attention sink) lies hundreds of times further out, always in the same
few channels. So rows are of one or two *kinds*, and a row is plausible when for one of them

- no channel is further from its centre than `reach` spreads, and
- its energy, the mean square of those distances (each counted as `ENERGY_CAP` at most), lies between two bounds.

Zeros say something of their own: a channel is almost never exactly zero, so many zeros in a row are a dead lane.

Bounds are measured once, at import, over text of many kinds and random tokens (`measure`), widened by `REACH_MARGIN`
and `ENERGY_MARGIN`, and are part of the manifest: a device does not learn them from whom it is to judge. What they
catch, what they let pass and how often they are wrong is in `docs/security/containment.md`.
"""

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

REACH_MARGIN = 3.0
ENERGY_MARGIN = 3.0
"""Over 27,000 rows of text, code and noise, what a thousand rows had shown was exceeded 2.6 and 2.1 times at most."""
ENERGY_CAP = np.float32(4.0)
"""So that a few outlier channels do not drown what the other channels say."""
REACH_MIN = 12.0
"""A normal distribution of a thousand channels reaches 4 spreads; a few hundred rows may have shown nothing rarer."""
SPREAD_FLOOR = 0.05
"""Of the median spread: a channel that hardly moves over the rows measured may move elsewhere."""
SINK_FACTOR = 4.0
"""A row whose root mean square is that many times the median is of the second kind."""
KIND_ROWS_MIN = 8
"""Fewer rows than that say nothing about a kind, and it is measured with the other one."""
ZEROS_SHARE = 1 / 64
ZEROS_MIN = 4

Floats = NDArray[np.float32]


class RowKind(msgspec.Struct, frozen=True):
    """One kind of row at one cut point. `centre`, `spread`: float32 `[hidden]`."""

    centre: Floats
    spread: Floats
    reach: float
    energy_min: float
    energy_max: float


class RowRules:
    """The rules of one cut point, ready to use."""

    def __init__(self, kinds: Sequence[RowKind]) -> None:
        self._kinds = [(kind, np.float32(1.0) / kind.spread) for kind in kinds]
        self.hidden_size = len(kinds[0].centre) if kinds else 0
        self._zeros_max = max(ZEROS_MIN, int(self.hidden_size * ZEROS_SHARE))

    def complaint(self, rows: NDArray[Any]) -> str | None:
        """Why one of these rows `[n, hidden]`, float16 or float32, cannot be what a sound stage sends, or `None`."""
        wide = rows.astype(np.float32)
        if wide.size - np.count_nonzero(wide) > self._zeros_max:
            zeros = int((wide == 0).sum(axis=1).max())
            if zeros > self._zeros_max:
                return f"{zeros} of {self.hidden_size} channels of a row are exactly zero"
        with np.errstate(invalid="ignore", over="ignore"):
            for kind, inverse in self._kinds:
                wide = wide[~_plausible(wide, kind, inverse)]
                if not len(wide):
                    return None
        return _describe(wide[0], self._kinds)


def _plausible(rows: Floats, kind: RowKind, inverse: Floats) -> NDArray[np.bool_]:
    distances = rows - kind.centre
    distances *= inverse
    np.abs(distances, out=distances)
    reach = distances.max(axis=1)
    np.minimum(distances, ENERGY_CAP, out=distances)
    energy = np.einsum("nh,nh->n", distances, distances) / np.float32(distances.shape[1])
    # Comparisons with NaN are false, so that what is not a number is not plausible.
    plausible: NDArray[np.bool_] = (reach <= kind.reach) & (energy >= kind.energy_min) & (energy <= kind.energy_max)
    return plausible


def _describe(row: Floats, kinds: Sequence[tuple[RowKind, Floats]]) -> str:
    if not np.isfinite(row).all():
        return "a row is not finite"
    kind, inverse = kinds[0]
    distances = (row - kind.centre) * inverse
    channel = int(np.abs(distances).argmax())
    energy = float(np.mean(np.square(np.minimum(np.abs(distances), ENERGY_CAP))))
    return (
        f"a row is like none that the model makes here: channel {channel} is {abs(float(distances[channel])):.1f} "
        f"spreads from its centre, the row's energy {energy:.2f}"
    )


def measure(rows: Floats) -> tuple[RowKind, ...]:
    """The kinds of these rows `[n, hidden]`, with bounds that hold for them and by the margins for others."""
    size = np.sqrt(np.mean(np.square(rows, dtype=np.float64), axis=1))
    far = size > SINK_FACTOR * float(np.median(size))
    if int(far.sum()) < KIND_ROWS_MIN:
        return (_kind(rows),)
    return (_kind(rows[~far]), _kind(rows[far]))


def _kind(rows: Floats) -> RowKind:
    # Rounded to what a manifest keeps of them, so that the bounds are those of the numbers that will be used.
    centre = rows.mean(axis=0, dtype=np.float64).astype(np.float16).astype(np.float32)
    spread = rows.std(axis=0, dtype=np.float64)
    spread = np.maximum(spread, max(SPREAD_FLOOR * float(np.median(spread)), float(np.finfo(np.float16).tiny)))
    spread = spread.astype(np.float16).astype(np.float32)
    distances = np.abs(rows - centre) / spread
    energy = np.mean(np.square(np.minimum(distances, ENERGY_CAP)), axis=1)
    return RowKind(
        centre=centre,
        spread=spread,
        reach=max(REACH_MIN, REACH_MARGIN * float(distances.max())),
        energy_min=float(energy.min()) / ENERGY_MARGIN,
        energy_max=float(energy.max()) * ENERGY_MARGIN,
    )

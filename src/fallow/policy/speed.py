"""How fast a device computes layers, by what it measured. Pure."""

from fallow.domain.fleet import Speed

ROWS_MAX = 16
"""Rows of one call up to which more of them are thought to be cheaper by the row."""
LAYER_S_MIN = 1e-6
"""Faster than any device computes a layer; what reports less is believed that much."""
UNKNOWN_ROW_SHARE = 0.2
"""What a further row costs of the first one, where nothing was measured."""


def layer_s(speed: Speed | None, rows: int, unknown_s: float) -> float:
    """Seconds that a layer takes for a call of `rows` rows: the measured points joined by lines, the last line drawn
    out to `ROWS_MAX` rows, and proportional beyond.

    More rows never take less time, whatever a device says: noise or a lie would draw every session to it.
    """
    if speed is None:
        return unknown_s * (1 + UNKNOWN_ROW_SHARE * (rows - 1))
    one = max(speed.layer_s_1, LAYER_S_MIN)
    four = max(speed.layer_s_4, one)
    if rows <= 4:
        return one + (four - one) * (rows - 1) / 3
    if rows <= ROWS_MAX:
        return four + max(speed.layer_s_8 - four, 0.0) * (rows - 4) / 4
    return layer_s(speed, ROWS_MAX, unknown_s) * rows / ROWS_MAX


def layers_per_s(speed: Speed | None, unknown_s: float) -> float:
    """What a device computes at best: layers a second times the rows of a call, at `ROWS_MAX` rows."""
    return ROWS_MAX / max(layer_s(speed, ROWS_MAX, unknown_s), 1e-9)

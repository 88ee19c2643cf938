"""Attacks with numbers: rows and results that a sound device cannot have made.

The rules are the default ones for a small model, as its import measured them; whole chains that leave such a device are
in tests/simulation/test_damaged_rows.py. Each test states the attack, what is expected, and what stayed unharmed.
"""

import numpy as np
import pytest

from fallow.domain.frames import Result
from fallow.domain.ids import SessionId
from fallow.domain.model import Quantisation
from fallow.gateway.results import last_candidates
from fallow.models.manifest import decode_manifest, encode_manifest, row_rules
from fallow.node.row_checks import RowChecks
from tests.unit.engine.engine_world import Driver, family, hidden_rows, name_of, step_of

LAYER = 2
RESULT = Result(session=SessionId("0" * 32), epoch=1, position=0, count=1, logit_count=1, k=3)


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    """What a sound first half of the model sends, `[40, hidden]`."""
    model = family("qwen2", Quantisation.Q8)
    from fallow.domain.model import Span

    driver = Driver(model.hosted(Span(0, LAYER)))
    driver.core.open(name_of(1), model.digest, Span(0, LAYER), 60)
    tokens = np.random.default_rng(3).integers(model.manifest.config.vocab_size, size=40).tolist()
    [stepped] = driver.run(step_of(name_of(1), 0, tokens))
    return hidden_rows(model, stepped, len(tokens)).copy()


def complaint(rows: np.ndarray) -> str | None:
    model = family("qwen2", Quantisation.Q8)
    checks = RowChecks()
    checks.learn(model.digest, model.manifest)
    return checks.complaint(model.digest, LAYER, rows.tobytes(), len(rows))


def test_a_row_with_infinity_among_sound_ones(rows: np.ndarray) -> None:
    """
    Attack: one value of one row in forty is infinite, so that everything after it becomes so.
    Expected: the receiving stage refuses the frame before it computes.
    Unharmed: the same rows without it are taken.
    """
    assert complaint(rows) is None
    rows = rows.copy()
    rows[17, 5] = np.inf
    assert complaint(rows) == "a row is not finite"


def test_rows_that_are_far_too_large(rows: np.ndarray) -> None:
    """
    Attack: rows are sent sixty-four times as large as they are, to drown what other positions say.
    Expected: refused, with the channel that gives it away.
    Unharmed: rows of their own size are taken.
    """
    assert "channel" in (complaint(rows * np.float16(64)) or "")
    assert complaint(rows) is None


def test_a_dead_lane(rows: np.ndarray) -> None:
    """
    Attack: a device sends zeros for half of the channels, which no bound on size would notice.
    Expected: refused by the number of exact zeros.
    Unharmed: rows as they are.
    """
    damaged = rows.copy()
    damaged[20, ::2] = 0
    assert "exactly zero" in (complaint(damaged) or "")
    assert complaint(rows) is None


def test_bounds_that_allow_everything_are_no_bounds() -> None:
    """
    Attack: a publisher's manifest brings bounds that are no numbers, of the wrong size, or for a layer twice.
    Expected: `ModelError` wherever a manifest is read.
    Unharmed: the model's own bounds are read.
    """
    import msgspec

    from fallow.domain.errors import ModelError

    manifest = family("qwen2", Quantisation.Q8).manifest
    assert row_rules(decode_manifest(encode_manifest(manifest)))
    first = manifest.activations[0]
    kind = first.kinds[0]
    for broken in (
        (first, first),
        (msgspec.structs.replace(first, layer=99),),
        (msgspec.structs.replace(first, kinds=()),),
        (msgspec.structs.replace(first, kinds=(msgspec.structs.replace(kind, spread=kind.spread[:-8]),)),),
        (msgspec.structs.replace(first, kinds=(msgspec.structs.replace(kind, centre="?"),)),),
        (msgspec.structs.replace(first, kinds=(msgspec.structs.replace(kind, reach=-1.0),)),),
        (msgspec.structs.replace(first, kinds=(msgspec.structs.replace(kind, energy_min=9e9),)),),
    ):
        with pytest.raises(ModelError):
            decode_manifest(encode_manifest(msgspec.structs.replace(manifest, activations=broken)))


@pytest.mark.parametrize(
    ("ids", "logprobs"),
    [
        ([1, 2, 3], [-0.1, -0.2, -0.3]),
        ([1, 1, 1], [-1.1, -1.2, -1.3]),
        ([3, 2, 1], [-3.0, -2.0, -1.0]),
        ([1, 2, 999], [-1.1, -2.0, -3.0]),
        ([1, 2, 3], [0.5, -9.0, -9.0]),
        ([1, 2, 3], [-1.0, float("-inf"), float("nan")]),
    ],
)
def test_a_result_that_is_no_distribution(ids: list[int], logprobs: list[float]) -> None:
    """
    Attack: the last device answers with more than everything, a token thrice, out of order, or unknown tokens.
    Expected: the gateway does not believe it; its chain is repaired without the sender.
    Unharmed: a distribution is believed.
    """
    forged = np.asarray(ids, np.int32).tobytes() + np.asarray(logprobs, np.float32).tobytes()
    assert last_candidates(RESULT, forged, 300) is None
    honest = np.asarray([7, 3, 9], np.int32).tobytes() + np.log([0.5, 0.3, 0.1]).astype(np.float32).tobytes()
    assert last_candidates(RESULT, honest, 300) is not None

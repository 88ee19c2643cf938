"""What hostile nodes may send: heartbeats that cannot be true are refused by name, true ones pass whole."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallow.coordinator import checks
from fallow.domain.errors import BusMessageError
from fallow.domain.fleet import (
    OUTLOOK_HORIZONS_S,
    Heartbeat,
    HostedStage,
    Outlook,
    Speed,
    StageStatus,
    Subjects,
)
from fallow.domain.frames import PeerAddress
from fallow.domain.ids import Digest, NodeId
from fallow.domain.model import Span, StageSpec

NODE = NodeId("ab" * 32)
MODEL = Digest("cd" * 32)
SUBJECT = Subjects("test").heartbeat(NODE)

BEAT = Heartbeat(
    node=NODE,
    name="a desk in the hall",
    sequence=7,
    boot="0123456789abcdef",
    address=PeerAddress(node=NODE, endpoints=("10.0.0.7:7000",)),
    memory_bytes=8 << 30,
    kv_budget_bytes=2 << 30,
    kv_free_bytes=1 << 30,
    hosted=(
        HostedStage(
            stage=StageSpec(model=MODEL, pieces=(Span(0, 4), Span(4, 8))),
            status=StageStatus.READY,
            weights_bytes=1 << 30,
            progress=1.0,
            speed=Speed(layer_s_1=0.004, layer_s_4=0.005, layer_s_8=0.007),
        ),
    ),
    link_rtt_s={NodeId("ef" * 32): 0.02},
    region="eu-west",
    disk_free_bytes=100 << 30,
    cached={MODEL: (Span(0, 8), Span(16, 24))},
    outlook=Outlook(survival=(0.99, 0.95, 0.9, 0.5, 0.5), expected_s=6000.0),
)


def refused(beat: dict[str, Any]) -> str:
    with pytest.raises(BusMessageError) as caught:
        checks.heartbeat(SUBJECT, msgspec.json.encode(beat))
    return caught.value.message


def changed(**fields: Any) -> dict[str, Any]:
    return {**msgspec.to_builtins(BEAT), **fields}


def outlook(**fields: Any) -> dict[str, Any]:
    return changed(outlook={**msgspec.to_builtins(BEAT.outlook), **fields})


def test_a_true_heartbeat_passes_whole() -> None:
    assert checks.heartbeat(SUBJECT, msgspec.json.encode(BEAT)) == BEAT


def test_an_older_nodes_heartbeat_passes_without_the_newer_fields() -> None:
    newer = ("region", "disk_free_bytes", "cached", "outlook")
    beat = {key: value for key, value in msgspec.to_builtins(BEAT).items() if key not in newer}
    heard = checks.heartbeat(SUBJECT, msgspec.json.encode(beat))
    assert (heard.region, heard.disk_free_bytes, heard.cached, heard.outlook) == ("", None, {}, None)


@pytest.mark.parametrize(
    ("beat", "words"),
    [
        (changed(region="x" * 65), "region"),
        (changed(region="eu\nwest"), "region"),
        (changed(disk_free_bytes=-1), "disk_free_bytes"),
        (changed(disk_free_bytes=1 << 61), "disk_free_bytes"),
        (changed(cached={f"{index:064x}": [] for index in range(checks.CACHED_MODELS_MAX + 1)}), "cached models"),
        (changed(cached={"not a digest": []}), "digest"),
        (changed(cached={MODEL: [[3, 3]]}), "expected a Heartbeat"),
        (changed(cached={MODEL: [{"first": 3, "last": 3}]}), "ascending cached spans"),
        (changed(cached={MODEL: [{"first": 4, "last": 8}, {"first": 0, "last": 4}]}), "ascending cached spans"),
        (changed(cached={MODEL: [{"first": 0, "last": checks.LAYERS_MAX + 1}]}), "ascending cached spans"),
        (
            changed(cached={MODEL: [{"first": 2 * at, "last": 2 * at + 1} for at in range(65)]}),
            "cached spans of a model",
        ),
        (outlook(survival=[0.9] * 4), "5 horizons"),
        (outlook(survival=[]), "5 horizons"),
        (outlook(survival=[0.5, 0.6, 0.5, 0.5, 0.5]), "falls"),
        (outlook(survival=[1.1, 0.9, 0.9, 0.9, 0.9]), "falls"),
        (outlook(survival=[0.9, 0.8, 0.7, 0.6, -0.1]), "falls"),
        (outlook(expected_s=-1.0), "expected_s"),
        (outlook(expected_s=OUTLOOK_HORIZONS_S[-1] * 2), "expected_s"),
        (changed(link_rtt_s={"x" * 10_000: 0.1}), "a link's node id"),
        (changed(link_rtt_s={"x" * 100_000: 0.1}), "a heartbeat of up to 65536 bytes"),
        (changed(link_rtt_s={NODE: -0.1}), "round trip"),
        (changed(memory_bytes=1 << 62), "memory_bytes"),
        (changed(kv_budget_bytes=9 << 30), "kv_budget_bytes"),
        (changed(tokens_per_s=float("1e300")), "tokens_per_s"),
        (changed(node="ee" * 32), "subject"),
        (changed(hosted=[{"stage": {"model": MODEL, "pieces": []}, "status": "ready"}]), "pieces"),
    ],
)
def test_what_cannot_be_true_is_refused_by_name(beat: dict[str, Any], words: str) -> None:
    assert words in refused(beat)


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"null", b'"0.5"', b"9" * 5000])
@pytest.mark.parametrize("field", [b'"expected_s":6000.0', b'"layer_s_1":0.004', b'"tokens_per_s":0.0'])
def test_numbers_that_are_none_are_refused(field: bytes, number: bytes) -> None:
    message = msgspec.json.encode(BEAT)
    assert field in message
    with pytest.raises(BusMessageError):
        checks.heartbeat(SUBJECT, message.replace(field, field.split(b":")[0] + b":" + number))


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_garbage_is_refused(message: bytes) -> None:
    with pytest.raises(BusMessageError):
        checks.heartbeat(SUBJECT, message)


@given(data=st.data())
def test_a_field_of_any_other_kind_is_refused_or_harmless(data: st.DataObject) -> None:
    """Whatever stands in a field: the message is refused by name, or what came out keeps the bounds."""
    field = data.draw(st.sampled_from(sorted(msgspec.to_builtins(BEAT))))
    json = st.recursive(
        st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=6,
    )
    try:
        beat = checks.heartbeat(SUBJECT, msgspec.json.encode(changed(**{field: data.draw(json)})))
    except BusMessageError:
        return
    assert beat.node == NODE
    assert 0 <= beat.kv_budget_bytes <= beat.memory_bytes <= checks.MEMORY_MAX_BYTES
    assert 0 <= beat.tokens_per_s <= checks.ROWS_PER_S_MAX


def test_announcements_and_reports_that_would_fill_a_status_are_refused_by_name() -> None:
    with pytest.raises(BusMessageError, match="announcement of up to"):
        checks.store_announced("fallow.test.gateway.x.store", b" " * (checks.STORE_MAX_BYTES + 1))
    with pytest.raises(BusMessageError, match="report of up to"):
        checks.gateway_report("fallow.test.gateway.x.report", b" " * (checks.GATEWAY_MAX_BYTES + 1))

"""Answers fit a bus message whatever was told, say what they lack, and lose the least useful first."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.coordinator.answers import KEPT_S, KeptAnswer, encode_catalogue, encode_status
from fallow.domain.cells import CellDigest, NeighbourCell
from fallow.domain.fleet import Catalogue, FleetStatus, GatewayReport
from fallow.domain.ids import Digest, NodeId
from fallow.fabric.contract import MAX_BUS_MESSAGE_BYTES
from tests.unit.coordinator.test_registry import beat, entry


def name(index: int) -> NodeId:
    return NodeId(f"{index:064x}")


def status(nodes: int, links: int, gateways: int, chains: int, neighbours: int, models: int) -> FleetStatus:
    rtts = {name(index): 0.25 for index in range(links)}
    digest = CellDigest(
        cell="far", boot="1", sequence=1, devices=1, devices_max=1, region="x" * 60, models=()
    )  # fmt: skip
    return FleetStatus(
        nodes=tuple(msgspec.structs.replace(beat(name(index), 1), link_rtt_s=rtts) for index in range(nodes)),
        silent_s={name(index): 1.0 / 3 for index in range(nodes)},
        models=tuple(entry(Digest(name(index)), 100) for index in range(models)),
        gateways=tuple(
            GatewayReport(gateway=name(index), url="", sessions=1, tokens_per_s=1.0, chains=((name(0),),) * chains)
            for index in range(gateways)
        ),
        neighbours=(NeighbourCell(digest=digest, silent_s=0.0, rtt_s=None, sessions_sent=0),) * neighbours,
        unplaceable={Digest(name(index)): "no room" for index in range(models)},
        nodes_left_out=3,
    )


def told(of: FleetStatus, bytes_max: int) -> FleetStatus:
    encoded = encode_status(of, bytes_max)
    assert len(encoded) <= bytes_max
    return msgspec.json.decode(encoded, type=FleetStatus)


@settings(max_examples=60, deadline=None)
@given(st.tuples(*[st.integers(0, 12)] * 6), st.integers(2_000, 60_000))
def test_any_status_fits_and_says_what_it_lacks(sizes: tuple[int, int, int, int, int, int], bytes_max: int) -> None:
    whole = status(*sizes)
    cut = told(whole, bytes_max)
    assert len(cut.nodes) + cut.nodes_left_out == len(whole.nodes) + whole.nodes_left_out
    assert len(cut.models) + cut.models_left_out == len(whole.models)
    assert len(cut.gateways) + cut.gateways_left_out == len(whole.gateways)
    assert len(cut.neighbours) + cut.neighbours_left_out == len(whole.neighbours)
    assert not cut.nodes or cut.chains_left_out in (0, sum(len(each.chains) for each in whole.gateways))
    assert set(cut.silent_s) == {beat.node for beat in cut.nodes}
    if len(msgspec.json.encode(whole)) <= bytes_max:
        assert cut == whole


def test_chains_go_before_neighbours_and_neighbours_before_devices() -> None:
    chatty = told(status(nodes=20, links=0, gateways=4, chains=2000, neighbours=5, models=1), 30_000)
    assert (chatty.chains_left_out, len(chatty.neighbours), len(chatty.nodes)) == (8000, 5, 20)
    crowded = told(status(nodes=20, links=0, gateways=4, chains=0, neighbours=300, models=1), 30_000)
    assert (crowded.neighbours_left_out, len(crowded.nodes)) == (300, 20)
    large = told(status(nodes=100, links=0, gateways=4, chains=0, neighbours=5, models=1), 30_000)
    assert len(large.nodes) > 30 and len(large.nodes) + large.nodes_left_out == 103


@pytest.mark.parametrize("count", [1, 1000, 4000])
def test_a_catalogue_fits_and_keeps_the_first_models(count: int) -> None:
    models = tuple(entry(Digest(name(index)), 60) for index in range(count))
    encoded = encode_catalogue(Catalogue(models=models, stores=()))
    assert len(encoded) <= MAX_BUS_MESSAGE_BYTES
    cut = msgspec.json.decode(encoded, type=Catalogue)
    assert cut.models == models[: len(cut.models)] and cut.models
    assert len(cut.models) + cut.models_left_out == count


def test_an_answer_is_given_again_for_a_moment() -> None:
    made: list[bytes] = []

    def make() -> bytes:
        made.append(b"answer %d" % len(made))
        return made[-1]

    kept = KeptAnswer()
    assert [kept.give(at_s, make) for at_s in (0.0, 0.1, KEPT_S - 0.01)] == [b"answer 0"] * 3
    assert kept.give(KEPT_S, make) == b"answer 1"

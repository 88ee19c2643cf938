"""The registry: what it keeps up with every fact is what a look at everything would find."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.coordinator import registry
from fallow.coordinator.registry import Fleet
from fallow.domain.errors import BusMessageError
from fallow.domain.fleet import (
    GatewayReport,
    Heartbeat,
    HostedStage,
    ModelEntry,
    Outlook,
    Speed,
    StageStatus,
    StoreAnnounced,
    Tier,
)
from fallow.domain.frames import PeerAddress
from fallow.domain.ids import Digest, ModelName, NodeId
from fallow.domain.model import Quantisation, Span, StageSpec
from fallow.policy.membership import MembershipRules, Presence
from fallow.policy.routing import Carrier
from fallow.policy.spans import covered
from tests.simulation.toy import toy_config

RULES = MembershipRules()
NODES = [NodeId(f"{index:064x}") for index in range(5)]
MODELS = [Digest(f"{index:064x}") for index in (0xA, 0xB)]
STORE = NodeId("5" * 64)
LAYERS = 6


def entry(model: Digest, layer_count: int = LAYERS, name: str = "") -> ModelEntry:
    return ModelEntry(
        name=ModelName(name or f"model-{model[-1]}"),
        model=model,
        manifest_bytes=100,
        config=toy_config(layer_count),
        quantisation=Quantisation.Q8,
        weights_bytes=(10, 10, (10,) * layer_count),
        created_unix_s=0,
    )


def store(*entries: ModelEntry, node: NodeId = STORE) -> StoreAnnounced:
    return StoreAnnounced(address=PeerAddress(node=node, endpoints=()), models=entries)


def beat(node: NodeId, sequence: int, *hosted: HostedStage, draining: bool = False, boot: str = "1") -> Heartbeat:
    return Heartbeat(
        node=node,
        name="device",
        sequence=sequence,
        boot=boot,
        address=PeerAddress(node=node, endpoints=()),
        memory_bytes=100,
        kv_budget_bytes=40,
        kv_free_bytes=30,
        hosted=hosted,
        draining=draining,
    )


def ready(model: Digest, *pieces: Span, status: StageStatus = StageStatus.READY) -> HostedStage:
    return HostedStage(stage=StageSpec(model=model, pieces=pieces), status=status)


PIECES = st.sampled_from(
    [(Span(0, 3),), (Span(3, 6),), (Span(0, 3), Span(3, 6)), (Span(0, 2), Span(4, 6)), (Span(3, 8),), (Span(1, 2),)]
)
HOSTED = st.lists(
    st.builds(
        lambda model, pieces, status: ready(model, *pieces, status=status),
        st.sampled_from(MODELS),
        PIECES,
        st.sampled_from([StageStatus.READY, StageStatus.READY, StageStatus.LOADING]),
    ),
    max_size=2,
    unique_by=lambda item: item.stage.model,
)
FACTS = st.lists(
    st.one_of(
        st.tuples(st.just("hear"), st.sampled_from(NODES), HOSTED, st.booleans(), st.sampled_from("12")),
        st.tuples(st.just("depart"), st.sampled_from(NODES), st.sampled_from([Presence.GONE, Presence.LEFT])),
        st.tuples(st.just("announce"), st.lists(st.sampled_from(MODELS), unique=True), st.sampled_from([6, 8])),
        st.tuples(st.just("forget")),
    ),
    max_size=30,
)


@given(FACTS)
@settings(max_examples=300)
def test_the_indexes_are_what_a_look_at_everybody_finds(facts: list[tuple[object, ...]]) -> None:
    fleet = Fleet()
    for now, fact in enumerate(facts):
        match fact:
            case "hear", node, hosted, draining, boot:
                fleet.hear(beat(node, now, *hosted, draining=draining, boot=boot), now, RULES)  # type: ignore[arg-type, misc]
            case "depart", node, presence:
                fleet.depart(node, presence, now)  # type: ignore[arg-type]
            case "announce", models, layer_count:
                fleet.announce(store(*(entry(model, layer_count) for model in models)), now)  # type: ignore[attr-defined, arg-type]
            case _:
                fleet.forget(now + 300.0, RULES)
        check(fleet)


def check(fleet: Fleet) -> None:
    here = {node: member for node, member in fleet.members.items() if member.presence is Presence.PRESENT}
    assert dict(fleet.present()) == {node: member.heartbeat for node, member in here.items()}
    for model in MODELS:
        known = fleet.entries().get(model)
        found: dict[NodeId, Carrier] = {}
        for node, member in here.items() if known else ():
            assert known is not None
            carrier = registry.carrier_of(member.heartbeat, model, known.config.layer_count)
            found |= {} if carrier is None else {node: carrier}
        assert dict(fleet.carriers(model)) == found
        if known is not None:
            layer_count = known.config.layer_count
            index = fleet.index(model)
            assert index is not None
            assert index.holders == [
                sum(covered(layer_count, [carrier.stage])[layer] for carrier in found.values())
                for layer in range(layer_count)
            ]
            assert registry.servable(fleet, known) == all(covered(layer_count, (c.stage for c in found.values())))


def test_a_stranger_is_not_heard_when_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "NODES_MAX", 2)
    fleet = Fleet()
    heard = [fleet.hear(beat(node, 1), 0.0, RULES) for node in NODES[:3]]
    assert [item is not None for item in heard] == [True, True, False]
    assert fleet.hear(beat(NODES[0], 2), 1.0, RULES) is not None, "those who are known go on"


def test_a_carrier_tells_what_routing_weighs_and_a_room_what_placement_does() -> None:
    outlook = Outlook(survival=(1.0, 0.9, 0.8, 0.5, 0.1), expected_s=9000.0)
    heartbeat = msgspec.structs.replace(
        beat(NODES[0], 1, ready(MODELS[0], Span(0, 6))),
        tokens_per_s=12.5,
        outlook=outlook,
        region="eu",
        disk_free_bytes=77,
        cached={MODELS[0]: (Span(0, 6),)},
    )
    carrier = registry.carrier_of(heartbeat, MODELS[0], LAYERS)
    assert carrier is not None
    assert (carrier.tokens_per_s, carrier.outlook, carrier.kv_free_bytes) == (12.5, outlook, 30)
    room = registry.room_of(heartbeat, (), {}, frozenset())
    assert (room.tier, room.region, room.disk_free_bytes, room.outlook) == (Tier.ANONYMOUS, "eu", 77, outlook)
    assert room.cached == {MODELS[0]: (Span(0, 6),)}


def test_of_two_models_of_one_name_the_first_stores_counts_and_stores_are_bounded() -> None:
    fleet = Fleet()
    assert fleet.announce(store(entry(MODELS[0], name="same")), 0.0)
    assert not fleet.announce(store(entry(MODELS[0], name="same")), 1.0)
    assert fleet.announce(store(entry(MODELS[1], name="same"), node=NODES[0]), 2.0)
    assert list(fleet.entries()) == [MODELS[0]]
    strangers = [store(node=NodeId(f"{index + 100:064x}")) for index in range(registry.STORES_MAX)]
    for stranger in strangers[: registry.STORES_MAX - 2]:
        fleet.announce(stranger, 3.0)
    with pytest.raises(BusMessageError, match="stores"):
        fleet.announce(strangers[-1], 3.0)
    assert len(fleet.stores) == registry.STORES_MAX


def test_a_later_store_cannot_replace_a_model_under_another_name() -> None:
    fleet = Fleet()
    fleet.announce(store(entry(MODELS[0], name="first")), 0.0)
    fleet.announce(store(entry(MODELS[0], layer_count=8, name="second"), node=NODES[0]), 1.0)
    assert fleet.entries() == {MODELS[0]: entry(MODELS[0], name="first")}


def test_a_store_that_was_not_heard_for_long_gives_way_to_a_new_one() -> None:
    fleet = Fleet()
    for index in range(registry.STORES_MAX):
        fleet.announce(store(node=NodeId(f"{index + 100:064x}")), float(index))
    with pytest.raises(BusMessageError):
        fleet.announce(store(entry(MODELS[0])), registry.STORE_FORGOTTEN_S)
    assert fleet.announce(store(entry(MODELS[0])), registry.STORE_FORGOTTEN_S + 0.5)
    assert NodeId(f"{100:064x}") not in fleet.stores and len(fleet.stores) == registry.STORES_MAX
    assert list(fleet.entries()) == [MODELS[0]]


def test_pieces_that_end_elsewhere_than_at_cut_points_carry_nothing() -> None:
    heartbeat = beat(NODES[0], 1, ready(MODELS[0], *(Span(at, at + 1) for at in range(36))))
    assert registry.carrier_of(heartbeat, MODELS[0], 36) is None
    heartbeat = beat(NODES[0], 1, ready(MODELS[0], Span(0, 3), Span(3, 36)))
    assert registry.carrier_of(heartbeat, MODELS[0], 36) is not None


def test_silent_gateways_are_forgotten_and_gateways_are_bounded() -> None:
    fleet = Fleet()
    for index in range(registry.GATEWAYS_MAX + 5):
        fleet.report(GatewayReport(gateway=NodeId(f"{index:064x}"), url="", sessions=0, tokens_per_s=0.0), 0.0)
    assert len(fleet.gateways) == registry.GATEWAYS_MAX
    fleet.forget(registry.GATEWAY_SILENCE_MAX_S + 0.1, RULES)
    assert fleet.gateways == {}


def test_sources_start_at_another_place_for_each_who_asks_and_end_with_silent_stores() -> None:
    fleet = Fleet()
    fleet.announce(store(entry(MODELS[0])), 0.0)
    for node in NODES:
        fleet.hear(beat(node, 1, ready(MODELS[0], Span(0, 6))), 0.0, RULES)
    firsts = set()
    for asking in NODES:
        found = [address.node for address in registry.sources_of(fleet, MODELS[0], asking, 1.0, 3)]
        assert found[0] == STORE
        assert len(found) == 3
        assert asking not in found
        firsts.add(found[1])
    assert len(firsts) > 2
    everybody = [address.node for address in registry.sources_of(fleet, MODELS[0], NODES[0], 100.0, 16)]
    assert sorted(everybody) == sorted([*NODES[1:], STORE])
    assert everybody[-1] == STORE, "a silent store is the last to be asked"


def test_a_device_that_only_has_the_files_is_a_source() -> None:
    fleet = Fleet()
    fleet.announce(store(entry(MODELS[0])), 0.0)
    cached = msgspec.structs.replace(beat(NODES[0], 1), cached={MODELS[0]: (Span(0, 2),)})
    fleet.hear(cached, 0.0, RULES)
    fleet.hear(beat(NODES[1], 1), 0.0, RULES)
    assert [address.node for address in registry.sources_of(fleet, MODELS[0], NODES[2], 1.0, 4)] == [STORE, NODES[0]]


def test_an_excuse_moves_everybodys_silence() -> None:
    fleet = Fleet()
    fleet.hear(beat(NODES[0], 1), 0.0, RULES)
    fleet.excuse(5.0)
    assert fleet.members[NODES[0]].heard_s == 5.0


def test_a_speed_is_taken_from_whatever_was_measured() -> None:
    speed = Speed(layer_s_1=0.1, layer_s_4=0.2, layer_s_8=0.3)
    measured = msgspec.structs.replace(ready(MODELS[0], Span(0, 3)), speed=speed)
    assert registry.best_speed(beat(NODES[0], 1, ready(MODELS[1], Span(0, 3)), measured)) == speed
    assert registry.room_of(beat(NODES[0], 1), (), {}, frozenset()).layer_s == registry.LAYER_UNKNOWN_S

"""Whose word on models counts: what a captured store tells changes nothing of what others tell."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from fallow.coordinator import registry
from fallow.coordinator.stores import HeardStore, catalogue_of, disbelieved, why_disbelieved
from fallow.domain.charter import Charter, FleetPolicy, SignedModel
from fallow.domain.fleet import ModelEntry
from fallow.domain.ids import Digest, ModelName, NodeId
from fallow.domain.model import Family, Quantisation
from fallow.policy.figures import figures_of_entry
from tests.unit.coordinator.test_registry import entry, store

DIGESTS = [Digest(f"{index:064x}") for index in range(1, 5)]
NAMES = [ModelName(name) for name in ("llama", "qwen")]
TRUE = {digest: entry(digest, name=NAMES[index % 2]) for index, digest in enumerate(DIGESTS)}


def charter(signed: dict[Digest, SignedModel]) -> Charter:
    return Charter(
        policy=FleetPolicy(epoch=1),
        council={},
        root_version=1,
        timestamp_version=1,
        timestamp_expires_unix_s=1.0,
        models=frozenset(signed),
        signed=signed,
    )


sizes = st.integers(0, 1 << 40)
lies = st.builds(
    lambda true, name, layers, head, kv_heads: msgspec.structs.replace(
        true,
        name=name,
        config=msgspec.structs.replace(true.config, layer_count=len(layers), kv_head_count=kv_heads),
        weights_bytes=(true.weights_bytes[0], head, tuple(layers)),
    ),
    st.sampled_from(list(TRUE.values())),
    st.sampled_from(NAMES),
    st.lists(sizes, min_size=1, max_size=8),
    sizes,
    st.integers(1, 64),
)
told = st.lists(
    st.lists(st.one_of(st.sampled_from(list(TRUE.values())), lies), max_size=4).map(
        lambda entries: HeardStore(store(*entries), 0.0)
    ),
    max_size=4,
)
charters = st.dictionaries(st.sampled_from(DIGESTS), st.integers(0, 3), max_size=4).map(
    lambda ranks: charter({model: SignedModel(rank, (figures_of_entry(TRUE[model]),)) for model, rank in ranks.items()})
)


@given(told, charters)
def test_what_is_signed_is_in_the_catalogue_as_it_was_signed_whatever_else_is_told(
    stores: list[HeardStore], word: Charter
) -> None:
    catalogue = catalogue_of(stores, word)
    honest = {each.model for heard in stores for each in heard.announced.models if each == TRUE[each.model]}
    for model in word.models & honest:
        owner = min(
            (other for other in word.models & honest if TRUE[other].name == TRUE[model].name),
            key=lambda other: (word.signed[other].rank, other),
        )  # of one publisher's two, whoever told of them first
        assert (model in catalogue) == (model == owner)
    for model in word.models & catalogue.keys():
        assert catalogue[model] == TRUE[model]
    assert len({each.name for each in catalogue.values()}) == len(catalogue)


@given(told, charters)
def test_a_word_that_is_not_believed_is_as_if_it_had_not_been_said(stores: list[HeardStore], word: Charter) -> None:
    silent = [
        HeardStore(store(*(each for each in heard.announced.models if why_disbelieved(each, word) is None)), 0.0)
        for heard in stores
    ]
    assert catalogue_of(silent, word) == catalogue_of(stores, word)


@given(told)
def test_without_a_charter_every_word_counts_and_the_first_comes_first(stores: list[HeardStore]) -> None:
    names: set[str] = set()
    expected: dict[Digest, ModelEntry] = {}
    for each in (each for heard in stores for each in heard.announced.models):
        assert why_disbelieved(each, None) is None
        if each.name not in names and each.model not in expected:
            names.add(each.name)
            expected[each.model] = each
    assert catalogue_of(stores, None) == expected
    assert list(catalogue_of(stores, None)) == list(expected)


@given(
    st.sampled_from(list(Family)), st.integers(1, 1 << 20), st.integers(1, 1 << 20), st.integers(1, 1 << 20),
    st.floats(1e-9, 1.0), st.booleans(), st.integers(0, 1 << 40),
)  # fmt: skip
def test_what_placement_and_routing_use_of_an_announcement_are_its_figures(
    family: Family, heads: int, intermediate: int, vocabulary: int, epsilon: float, bias: bool, created: int
) -> None:
    """All that is not signed may be a lie: nothing of it reaches a decision. Who adds a use adds a figure."""
    true = TRUE[DIGESTS[0]]
    config = msgspec.structs.replace(
        true.config, family=family, head_count=heads, intermediate_size=intermediate, vocab_size=vocabulary,
        context_length=vocabulary, norm_epsilon=epsilon, rope_theta=epsilon, qkv_bias=bias, qk_norm=bias,
    )  # fmt: skip
    other = msgspec.structs.replace(true, config=config, created_unix_s=created, servable=bias)
    assert figures_of_entry(other) == figures_of_entry(true)
    assert registry.need_of(other) == registry.need_of(true)
    assert registry.shape_of(other) == registry.shape_of(true)
    assert (other.name, other.manifest_bytes) == (true.name, true.manifest_bytes)


def test_a_difference_is_named() -> None:
    true = TRUE[DIGESTS[0]]
    word = charter({true.model: SignedModel(0, (figures_of_entry(true),))})
    for lie, words in (
        (
            msgspec.structs.replace(true, weights_bytes=(10, 10, (10, 10, 10, 10, 10, 99))),
            "layer_bytes of 6 layers, 149",
        ),
        (msgspec.structs.replace(true, quantisation=Quantisation.Q4), "quantisation q4 and not q8"),
        (msgspec.structs.replace(true, name=ModelName("other")), "name 'other' and not 'llama'"),
    ):
        (error,) = disbelieved(store(lie, node=NodeId("a" * 64)), word)
        assert words in error.message and error.message.startswith("store aaaaaaaa, ")
    unsigned = charter({true.model: SignedModel(0, ())})
    (error,) = disbelieved(store(true), unsigned)
    assert "no publisher signed its figures" in error.message


def test_a_fleet_heeds_a_new_charter_without_a_new_announcement() -> None:
    fleet, true = registry.Fleet(), TRUE[DIGESTS[0]]
    lie = msgspec.structs.replace(true, weights_bytes=(10, 10, (99,) * 6))
    fleet.announce(store(lie), 0.0)
    word = charter({true.model: SignedModel(0, (figures_of_entry(true),))})
    assert fleet.entries() == {true.model: lie}, "in the development mode, whatever is told"
    assert fleet.heed(word) and fleet.entries() == {}
    assert not fleet.heed(word)
    assert registry.sources_of(fleet, true.model, None, 1.0, 4) == ()
    fleet.announce(store(true, node=NodeId("b" * 64)), 2.0)
    assert fleet.entries() == {true.model: true}
    assert [each.node for each in registry.sources_of(fleet, true.model, None, 3.0, 4)] == [NodeId("b" * 64)]

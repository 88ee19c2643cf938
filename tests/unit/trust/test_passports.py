"""Passports: who they are of, for how long, and until when they were taken back."""

import pytest

from fallow.domain.credentials import (
    PASSPORT_GRACE_S,
    PASSPORT_LIFE_S,
    Departure,
    Passport,
    Revocation,
    RevocationList,
    Role,
)
from fallow.domain.errors import PassportRefused, RequestRefused, SignatureInvalid
from fallow.domain.fleet import Tier
from fallow.domain.network import Network
from fallow.policy.bus_rights import rights_of
from fallow.policy.enrolment import REVOCATION_KEPT_S
from fallow.trust import jwt, passports
from fallow.trust.envelope import Kind, seal
from fallow.trust.keys import Identity, identity_of
from fallow.trust.passports import PassportReader, issue, issue_claims, issue_presence

ACCOUNT, REGISTRAR, ALICE, BOB, SYSTEM = (identity_of(bytes([index]) * 32) for index in range(1, 6))
NOW_S = 1_800_000_000.0
NETWORK = Network(
    format=1,
    name="test",
    cell="home",
    authority_pem="",
    account=jwt.account_nkey(ACCOUNT.node),
    registrar=REGISTRAR.node,
    tuf_root="",
)


class SetClock:
    """A clock that stands where it was put."""

    def __init__(self, unix_s: float = NOW_S) -> None:
        self.now_s = unix_s

    def unix_s(self) -> float:
        return self.now_s

    def monotonic_s(self) -> float:
        return self.now_s

    async def sleep(self, duration_s: float) -> None:
        self.now_s += duration_s


def passport(
    holder: Identity = ALICE, *, account: Identity = ACCOUNT, at_s: float = NOW_S, life_s: float = PASSPORT_LIFE_S
) -> str:
    return issue(
        account, node=holder.node, role=Role.NODE, tier=Tier.KEYED, cell="home", name="Alice's laptop ☕",
        issued_unix_s=at_s, life_s=life_s,
    )  # fmt: skip


def revocations(
    sequence: int,
    *gone: Identity,
    at_s: float = NOW_S,
    signer: Identity = REGISTRAR,
    departure: Departure = Departure.REVOKED,
    issued_s: float = NOW_S,
) -> bytes:
    told = tuple(Revocation(node=who.node, revoked_unix_s=at_s, departure=departure) for who in gone)
    body = RevocationList(sequence=sequence, issued_unix_s=issued_s, cell="home", revocations=told)
    return seal(Kind.REVOCATIONS, body, signer)


def test_it_says_who_its_holder_is() -> None:
    text = passport()
    assert PassportReader(NETWORK, SetClock()).read(text, holder=ALICE.node) == Passport(
        node=ALICE.node,
        role=Role.NODE,
        tier=Tier.KEYED,
        cell="home",
        name="Alice's laptop ☕",
        issued_unix_s=NOW_S,
        expires_unix_s=NOW_S + PASSPORT_LIFE_S,
        text=text,
    )


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("tier", Tier)
def test_every_role_and_tier_comes_through(role: Role, tier: Tier) -> None:
    text = issue(ACCOUNT, node=ALICE.node, role=role, tier=tier, cell="a-b_C", name="", issued_unix_s=NOW_S)
    read = PassportReader(NETWORK, SetClock()).read(text)
    assert (read.role, read.tier, read.cell) == (role, tier, "a-b_C")
    assert len(text) < jwt.USER_BYTES_MAX / 2
    found = jwt.peek(text)
    assert found is not None and found[0].nats.pub.allow == rights_of(role, ALICE.node, "a-b_C").publish


@pytest.mark.parametrize("holder", [None, ALICE])
def test_time_is_looked_at_on_every_reading(holder: Identity | None) -> None:
    clock = SetClock()
    reader, text = PassportReader(NETWORK, clock), passport(life_s=100)
    who = None if holder is None else holder.node
    for good_s in (0.0, -PASSPORT_GRACE_S, 99.0, 100 + PASSPORT_GRACE_S - 1):
        clock.now_s = NOW_S + good_s
        reader.read(text, who)
    clock.now_s = NOW_S + 100 + PASSPORT_GRACE_S
    with pytest.raises(PassportRefused, match="expired"):
        reader.read(text, who)
    clock.now_s = NOW_S - PASSPORT_GRACE_S - 1
    with pytest.raises(PassportRefused, match="clocks"):
        reader.read(text, who)


def test_another_holder_and_another_network_are_refused() -> None:
    reader = PassportReader(NETWORK, SetClock())
    reader.read(passport(), ALICE.node)
    with pytest.raises(PassportRefused, match="expected the passport of"):
        reader.read(passport(), BOB.node)
    with pytest.raises(PassportRefused, match="signed by"):
        reader.read(passport(account=BOB), ALICE.node)


def test_credentials_of_the_system_account_are_no_passports() -> None:
    reader = PassportReader(NETWORK, SetClock())
    for make in (issue_presence, issue_claims):
        for signer in (SYSTEM, ACCOUNT):
            with pytest.raises(PassportRefused):
                reader.read(make(signer, node=ALICE.node, account=ACCOUNT.node, issued_unix_s=NOW_S))


@pytest.mark.parametrize(
    "tags",
    [
        (),
        ("fallow:role=node", "fallow:tier=1"),
        ("fallow:role=node", "fallow:tier=1", "fallow:cell=home", "fallow:role=coordinator"),
        ("fallow:role=coordinator", "fallow:role=node", "fallow:cell=home"),
        ("fallow:role=king", "fallow:tier=1", "fallow:cell=home"),
        ("fallow:role=node", "fallow:tier=7", "fallow:cell=home"),
        ("fallow:role=node", "fallow:tier=1", "fallow:cell=home", "more"),
        ("fallow:role", "fallow:tier=1", "fallow:cell=home"),
    ],
)
def test_other_tags_are_refused(tags: tuple[str, ...]) -> None:
    rights = rights_of(Role.NODE, ALICE.node, "home")
    text = jwt.user_jwt(
        ACCOUNT, node=ALICE.node, name="", issued_unix_s=NOW_S, life_s=60, rights=rights, tags=tags
    )  # fmt: skip
    with pytest.raises(PassportRefused):
        PassportReader(NETWORK, SetClock()).read(text)


def test_a_repeat_costs_no_signature_and_the_cache_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passports, "VERIFIED_MAX", 2)
    verified: list[str] = []

    def counted(text: str, account: str):  # type: ignore[no-untyped-def]
        verified.append(text)
        return jwt.read_user(text, account)

    monkeypatch.setattr(passports, "read_user", counted)
    reader = PassportReader(NETWORK, SetClock())
    a, b, c = (passport(life_s=life_s) for life_s in (60, 61, 62))
    for text in (a, a, b, a, c, a):
        reader.read(text)
    assert verified == [a, b, c], "the one that was used last stays"
    reader.read(b)
    assert verified == [a, b, c, b]
    for _ in range(3):
        with pytest.raises(PassportRefused):
            reader.read("nothing")
    assert verified[-3:] == ["nothing"] * 3


def test_a_revoked_key_is_refused_until_it_has_a_newer_passport() -> None:
    clock = SetClock()
    reader, old = PassportReader(NETWORK, clock), passport()
    reader.read(old)
    assert reader.sequence is None
    learnt = reader.learn(revocations(7, ALICE, at_s=NOW_S + 10))
    assert learnt is not None and learnt.revocations[0].node == ALICE.node
    assert reader.revoked(ALICE.node) and not reader.revoked(BOB.node)
    for text in (old, passport(at_s=NOW_S + 10)):
        with pytest.raises(PassportRefused, match="revoked"):
            reader.read(text, ALICE.node)
    reader.read(passport(at_s=NOW_S + 11), ALICE.node)
    reader.read(passport(BOB), BOB.node)


def test_who_left_and_was_admitted_again_is_welcome_and_its_earlier_passports_stay_void() -> None:
    reader = PassportReader(NETWORK, SetClock())
    reader.learn(revocations(1, ALICE, at_s=NOW_S + 10, departure=Departure.LEFT))
    assert reader.revoked(ALICE.node)
    reader.learn(revocations(2, ALICE, at_s=NOW_S + 10, departure=Departure.RETURNED))
    assert not reader.revoked(ALICE.node)
    with pytest.raises(PassportRefused, match="revoked"):
        reader.read(passport(at_s=NOW_S + 10), ALICE.node)
    reader.read(passport(at_s=NOW_S + 11), ALICE.node)
    reader.learn(revocations(3, ALICE, at_s=NOW_S + 20, departure=Departure.LEFT))
    assert reader.revoked(ALICE.node), "it left again"


def test_that_a_key_left_ends_with_a_newer_list_that_does_not_say_so_and_its_passports_stay_void() -> None:
    reader = PassportReader(NETWORK, SetClock())
    reader.learn(revocations(1, ALICE, at_s=NOW_S + 10, departure=Departure.LEFT))
    reader.learn(revocations(2, BOB))
    assert not reader.revoked(ALICE.node) and reader.revoked(BOB.node)
    with pytest.raises(PassportRefused, match="revoked"):
        reader.read(passport(at_s=NOW_S + 10), ALICE.node)
    reader.read(passport(at_s=NOW_S + 11), ALICE.node)
    reader.learn(revocations(3))
    assert reader.revoked(BOB.node), "that a key was revoked does not end so"


@pytest.mark.parametrize("forgotten", [Departure.LEFT, Departure.RETURNED])
def test_that_a_key_was_revoked_holds_whatever_a_newer_list_makes_of_it(forgotten: Departure) -> None:
    """As of a registrar whose database was restored."""
    clock = SetClock()
    reader = PassportReader(NETWORK, clock)
    reader.learn(revocations(1, ALICE))
    clock.now_s += REVOCATION_KEPT_S - 1
    for sequence, told in ((2, (ALICE,)), (3, ())):
        reader.learn(revocations(sequence, *told, departure=forgotten, issued_s=clock.now_s))
        assert reader.revoked(ALICE.node)
    clock.now_s += 1
    reader.learn(revocations(4, issued_s=clock.now_s))
    assert not reader.revoked(ALICE.node), "a day after it was heard, and not longer"


def test_only_a_newer_list_of_the_registrar_for_this_cell_counts() -> None:
    reader = PassportReader(NETWORK, SetClock())
    assert reader.learn(revocations(2, ALICE)) is not None
    assert reader.learn(revocations(2)) is None and reader.learn(revocations(1)) is None
    assert reader.revoked(ALICE.node), "an old list frees nobody"
    with pytest.raises(SignatureInvalid, match="registrar"):
        reader.learn(revocations(9, signer=BOB))
    other = RevocationList(sequence=9, issued_unix_s=NOW_S, cell="elsewhere", revocations=())
    with pytest.raises(SignatureInvalid, match="cell"):
        reader.learn(seal(Kind.REVOCATIONS, other, REGISTRAR))
    with pytest.raises(SignatureInvalid):
        reader.learn(seal(Kind.HALT, other, REGISTRAR))
    with pytest.raises(SignatureInvalid):
        reader.learn(b"")
    assert reader.sequence == 2


def test_what_was_told_once_is_kept_for_a_day_after_newer_lists_leave_it_out() -> None:
    clock = SetClock()
    reader, old = PassportReader(NETWORK, clock), passport()
    reader.learn(revocations(1, ALICE))
    clock.now_s += REVOCATION_KEPT_S - 1
    assert reader.learn(revocations(2, BOB, at_s=clock.now_s, issued_s=clock.now_s)) is not None
    assert reader.revoked(ALICE.node) and reader.revoked(BOB.node)
    clock.now_s = NOW_S
    with pytest.raises(PassportRefused, match="revoked"):
        reader.read(old)
    clock.now_s = NOW_S + REVOCATION_KEPT_S
    assert reader.learn(revocations(3)) is None, "a list of a day ago is none any more"
    assert reader.learn(revocations(3, issued_s=NOW_S + 1)) is not None
    assert not reader.revoked(ALICE.node) and reader.revoked(BOB.node)


def test_revocations_are_forgotten_before_they_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passports, "REVOCATIONS_KEPT_MAX", 2)
    reader = PassportReader(NETWORK, SetClock())
    for sequence, who in enumerate((ALICE, BOB, SYSTEM)):
        reader.learn(revocations(sequence, who))
    assert [reader.revoked(who.node) for who in (ALICE, BOB, SYSTEM)] == [False, True, True]


@pytest.mark.parametrize("life_s", [0.0, -1.0, PASSPORT_LIFE_S + 1, float("inf"), float("nan")])
def test_no_passport_lives_longer_than_an_hour(life_s: float) -> None:
    with pytest.raises(RequestRefused, match="passport for up to"):
        passport(life_s=life_s)


def test_names_and_cells_are_bounded() -> None:
    for changes in ({"name": "n" * 101}, {"cell": "a.b"}, {"node": "*"}):
        given = {"node": ALICE.node, "role": Role.NODE, "tier": Tier.KEYED, "cell": "home", "name": ""} | changes
        with pytest.raises(RequestRefused):
            issue(ACCOUNT, issued_unix_s=NOW_S, **given)  # type: ignore[arg-type]

"""The registrar's decisions, on a real database: who gets in, who may ask for what, and what is recorded of it."""

import base64
import multiprocessing
import threading
from pathlib import Path

import msgspec
import pytest

from fallow.domain.credentials import PASSPORT_LIFE_S, Departure, RevocationList, Role
from fallow.domain.errors import ConfigError, FallowError, InvitationRefused, RequestRefused, SignatureInvalid
from fallow.domain.fleet import Tier
from fallow.policy.enrolment import BUS_DEPARTURES_KEPT_S, FORGOTTEN_S, REVOCATION_KEPT_S, Action, may_ask
from fallow.trust.envelope import Kind as Envelopes
from fallow.trust.envelope import unseal
from fallow.trust.jwt import account_nkey
from fallow.trust.keys import Identity, new_identity, user_nkey
from fallow.trust.membership import enrolment_of
from fallow.trust.passports import PassportReader
from fallow.trust.registrar.consent import Consent, sign_consent
from fallow.trust.registrar.invitations import from_text
from fallow.trust.registrar.journal import verify
from fallow.trust.registrar.requests import (
    NONCE_LIFE_S,
    Admitted,
    Enrol,
    Gone,
    Invite,
    Invited,
    JournalPage,
    Leave,
    ReadJournal,
    Renew,
    Revoke,
    Withdraw,
    Withdrawn,
)
from fallow.trust.registrar.service import REFUSALS_KEPT_PER_INVITATION
from fallow.trust.registrar.state import found, open_state, paths_of
from tests.unit.trust.registrar_world import BUS_URLS, HandClock, World, cut_by


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def later(world: World, seconds: float) -> None:
    assert isinstance(world.clock, HandClock)
    world.clock.now_s += seconds


# --- the network ----------------------------------------------------------------------------------


def test_a_network_is_founded_once(tmp_path: Path) -> None:
    first = World(tmp_path).state
    again = found(tmp_path, name="other", cell="other", tuf_root="{}", now_unix_s=5.0)
    assert (again.digest, again.network) == (first.digest, first.network)
    assert paths_of(tmp_path).folder.stat().st_mode & 0o077 == 0
    private = ("identity", "operator", "account", "system", "authority.key", "registrar.db")
    assert all((paths_of(tmp_path).folder / name).stat().st_mode & 0o077 == 0 for name in private)


def test_a_founding_that_was_interrupted_goes_on_with_its_keys(tmp_path: Path) -> None:
    first = World(tmp_path).state
    first.paths.network.unlink()
    assert World(tmp_path).state.account == first.account


def test_a_folder_without_a_network_or_with_anothers_keys_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no network"):
        open_state(tmp_path / "nothing")
    one, two = World(tmp_path / "one").state, World(tmp_path / "two").state
    (one.paths.folder / "account").write_bytes((two.paths.folder / "account").read_bytes())
    with pytest.raises(ConfigError, match="not those"):
        open_state(tmp_path / "one")


# --- enrolling ------------------------------------------------------------------------------------


def test_a_device_is_admitted_by_an_invitation_and_its_passport_is_believed(world: World) -> None:
    device = new_identity()
    answer = world.ask(device, world.enrolment(device, world.invitation(name="kitchen"), "ignored"))
    assert isinstance(answer, Admitted)
    passport = PassportReader(world.state.network, world.clock).read(answer.passport, holder=device.node)
    assert (passport.role, passport.tier, passport.cell, passport.name) == (Role.NODE, Tier.KEYED, "home", "kitchen")
    assert answer.expires_unix_s - answer.issued_unix_s == PASSPORT_LIFE_S == 3600
    assert answer.places.bus_urls == BUS_URLS
    assert answer.system_passport is None
    recorded = ["invitation_made", "invitation_used", "consent_given", "enrolled", "role_granted"]
    assert world.kinds() == ["network_founded", *recorded]
    verify(iter(world.journal()))


def test_the_journal_keeps_the_consent_that_the_device_signed(world: World) -> None:
    device = world.member()
    entry = next(entry for entry in world.journal() if entry.kind == "consent_given")
    body = msgspec.json.decode(entry.body, type=dict[str, str])
    envelope = msgspec.convert(body["envelope"], bytes)
    consent, signer = unseal(Envelopes.CONSENT, Consent, envelope)
    assert (signer, consent.network, consent.words) == (device.node, world.state.digest, "I lend this device.")


def test_only_coordinators_get_a_passport_of_the_system_account(world: World) -> None:
    given = {role: world.renewed(world.member(role)).system_passport for role in Role if role is not Role.REGISTRAR}
    assert [role for role, passport in given.items() if passport is not None] == [Role.COORDINATOR]


def test_an_invitation_is_used_once(world: World) -> None:
    invitation = world.invitation()
    first, second = new_identity(), new_identity()
    world.ask(first, world.enrolment(first, invitation))
    with pytest.raises(InvitationRefused, match="used already"):
        world.ask(second, world.enrolment(second, invitation))
    with pytest.raises(RequestRefused, match="never admitted"):
        world.renewed(second)
    assert "invitation_refused" in world.kinds()


def test_the_answer_that_was_lost_is_given_again_to_the_same_key_only(world: World) -> None:
    invitation, device = world.invitation(life_s=10.0), new_identity()
    world.ask(device, world.enrolment(device, invitation))
    later(world, 11.0)
    assert isinstance(world.ask(device, world.enrolment(device, invitation)), Admitted)
    assert world.kinds().count("enrolled") == 1


def test_of_many_who_come_with_one_invitation_at_once_exactly_one_is_admitted(world: World) -> None:
    invitation = world.invitation()
    devices = [new_identity() for _ in range(12)]
    requests = [world.signed(device, world.enrolment(device, invitation)) for device in devices]
    admitted: list[int] = []
    refused: list[str] = []
    gate = threading.Barrier(len(devices))

    def come(index: int) -> None:
        gate.wait()
        try:
            world.registrar.answer(requests[index])
            admitted.append(index)
        except InvitationRefused as error:
            refused.append(error.message)

    threads = [threading.Thread(target=come, args=(index,)) for index in range(len(devices))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(admitted) == 1
    assert len(refused) == len(devices) - 1
    assert [who.node for who in world.registrar.members()] == [devices[admitted[0]].node]


def test_of_two_processes_one_admits(world: World, tmp_path: Path) -> None:
    """The same race between two registrar processes over one database."""
    invitation = world.invitation(life_s=600.0)
    devices = [new_identity() for _ in range(4)]
    requests = [world.signed(device, world.enrolment(device, invitation)) for device in devices]
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        now_s = world.clock.unix_s()  # the other process would begin its own clock when it is started
        outcomes = pool.starmap(come_to_another_process, [(tmp_path, request, now_s) for request in requests])
    assert sorted(outcomes) == ["admitted", *["invitation_refused"] * 3]


def come_to_another_process(folder: Path, request: bytes, now_s: float) -> str:
    try:
        World(folder, HandClock(now_s)).registrar.answer(request)
    except FallowError as error:
        return error.code
    return "admitted"


def test_an_expired_invitation_is_refused_and_its_refusals_fill_no_journal(world: World) -> None:
    invitation = world.invitation(life_s=30.0)
    later(world, 30.0)
    for _ in range(REFUSALS_KEPT_PER_INVITATION + 3):
        device = new_identity()
        with pytest.raises(InvitationRefused, match="expired"):
            world.ask(device, world.enrolment(device, invitation))
    assert world.kinds().count("invitation_refused") == REFUSALS_KEPT_PER_INVITATION


def test_a_guessed_secret_or_an_unknown_invitation_is_refused(world: World) -> None:
    device, invitation = new_identity(), world.invitation()
    guessed = msgspec.structs.replace(invitation, secret=bytes(32))
    unknown = msgspec.structs.replace(invitation, id=bytes(16))
    for tried, words in ((guessed, "wrong secret"), (unknown, "no such invitation")):
        with pytest.raises(InvitationRefused, match=words):
            world.ask(device, world.enrolment(device, tried))
    assert isinstance(world.ask(device, world.enrolment(device, invitation)), Admitted)


def test_an_invitation_for_one_role_admits_no_other(world: World) -> None:
    device = new_identity()
    asked = msgspec.structs.replace(world.enrolment(device, world.invitation()), role=Role.OPERATOR)
    with pytest.raises(InvitationRefused, match="for a node"):
        world.ask(device, asked)


def test_a_device_is_not_admitted_without_its_own_consent(world: World) -> None:
    device, other = new_identity(), new_identity()
    network, words = world.state.digest, "I lend this device."
    wrong = {
        "of another device": sign_consent(other, network, Role.NODE, words),
        "to another network": sign_consent(device, "0" * 64, Role.NODE, words),
        "to another role": sign_consent(device, network, Role.GATEWAY, words),
    }
    for consent in wrong.values():
        with pytest.raises(SignatureInvalid, match="consent"):
            world.ask(device, enrolment_of(world.invitation(), "x", consent))
    with pytest.raises(RequestRefused, match="consent"):
        world.ask(device, enrolment_of(world.invitation(), "x", None))
    assert world.registrar.members() == []


def test_a_new_invitation_changes_a_members_role_and_that_is_recorded(world: World) -> None:
    who = world.member(Role.READER)
    world.ask(who, world.enrolment(who, world.invitation(Role.AUDITOR)))
    assert isinstance(world.ask(who, ReadJournal(after_seq=0)), JournalPage)
    granted = [msgspec.json.decode(entry.body)["role"] for entry in world.journal() if entry.kind == "role_granted"]
    assert granted == ["reader", "auditor"]


# --- requests -------------------------------------------------------------------------------------


def test_a_request_that_is_replayed_is_refused(world: World) -> None:
    request = world.signed(world.member(), Renew())
    world.registrar.answer(request)
    with pytest.raises(RequestRefused, match="made before"):
        world.registrar.answer(request)
    with pytest.raises(RequestRefused, match="made before"):
        World(world.state.paths.folder.parent, world.clock).registrar.answer(request)


def test_a_challenge_is_good_for_a_minute_and_here_only(world: World, tmp_path: Path) -> None:
    device = world.member()
    request = world.signed(device, Renew())
    later(world, NONCE_LIFE_S)
    with pytest.raises(RequestRefused, match="older than"):
        world.registrar.answer(request)
    elsewhere = World(tmp_path / "elsewhere").registrar.challenge().nonce
    made_up = f"{'0' * 32}.{int(world.clock.unix_s() * 1000) + 1000}.{'0' * 64}"
    for nonce in (elsewhere, made_up, "", "..", "x.y.z", "é" * 10):
        with pytest.raises(RequestRefused, match="not given out"):
            world.registrar.answer(world.signed(device, Renew(), nonce=nonce))


def test_a_request_to_one_network_is_none_to_another(world: World, tmp_path: Path) -> None:
    """A registrar in the middle gets the operator's signature for its own network, and carries it to ours."""
    operator = world.member(Role.OPERATOR)
    other = World(tmp_path / "other").state.digest
    with pytest.raises(RequestRefused, match="another network"):
        world.registrar.answer(world.signed(operator, Invite(role=Role.NODE, tier=Tier.KEYED, life_s=5), network=other))


def test_a_request_that_was_altered_or_is_another_document_is_refused(world: World) -> None:
    device = world.member()
    request = bytearray(world.signed(device, Renew()))
    request[len(request) // 2] ^= 1
    consent = sign_consent(device, world.state.digest, Role.NODE, "x")
    for forged in (bytes(request), consent, b"", b"\xc1" * 100, b"\x94" * 1000):
        with pytest.raises(SignatureInvalid):
            world.registrar.answer(forged)


def test_a_strangers_requests_leave_nothing_behind(world: World) -> None:
    before = world.kinds()
    for _ in range(5):
        with pytest.raises(RequestRefused, match="never admitted"):
            world.renewed(new_identity())
    assert world.kinds() == before
    assert world.registrar.members() == []


TRIED = {
    Action.RENEW: Renew(),
    Action.LEAVE: Leave(),
    Action.INVITE: Invite(role=Role.NODE, tier=Tier.KEYED, life_s=60.0),
    Action.WITHDRAW: Withdraw(which="lab"),
    Action.REVOKE: Revoke(node="0" * 64, why="because"),
    Action.READ_JOURNAL: ReadJournal(after_seq=0),
}
RIGHTS = {
    Role.NODE: {Action.RENEW, Action.LEAVE},
    Role.GATEWAY: {Action.RENEW, Action.LEAVE},
    Role.COORDINATOR: {Action.RENEW, Action.LEAVE},
    Role.READER: {Action.RENEW, Action.LEAVE},
    Role.AUDITOR: {Action.RENEW, Action.LEAVE, Action.READ_JOURNAL},
    Role.OPERATOR: set(Action),
}


@pytest.mark.parametrize("role", RIGHTS)
def test_the_whole_table_of_rights(world: World, role: Role) -> None:
    """What each role may ask, written down a second time, against the registrar itself."""
    victim = world.member()
    world.invitation(name="lab")
    for action, request in TRIED.items():
        who = world.member(role)
        asked = Revoke(node=victim.node, why="because") if action is Action.REVOKE else request
        if action in RIGHTS[role]:
            world.ask(who, asked)
        else:
            with pytest.raises(RequestRefused, match=f"A {role} may not"):
                world.ask(who, asked)
            assert world.kinds()[-1] == "request_refused"
    assert set(TRIED) == set(Action)


@pytest.mark.parametrize("action", Action)
def test_nobody_may_ask_anything_without_an_enrolment(action: Action) -> None:
    assert not may_ask(None, action, 0.0).yes


def test_from_afar_an_operator_invites_neither_who_signs_nor_who_admits(world: World) -> None:
    operator = world.member(Role.OPERATOR)
    invited = world.ask(operator, Invite(role=Role.GATEWAY, tier=Tier.ANONYMOUS, life_s=60.0, name="lab"))
    assert isinstance(invited, Invited)
    assert from_text(invited.text).role is Role.GATEWAY
    refused = [
        (Role.OPERATOR, Tier.KEYED, 60.0, "machine only"),
        (Role.COORDINATOR, Tier.KEYED, 60.0, "machine only"),
        (Role.REGISTRAR, Tier.KEYED, 60.0, "never invited"),
        (Role.NODE, Tier.ATTESTED, 60.0, "highest tier is keyed"),
        (Role.NODE, Tier.KEYED, 1e9, "at most 30 days"),
    ]
    for role, tier, life_s, words in refused:
        with pytest.raises(RequestRefused, match=words):
            world.ask(operator, Invite(role=role, tier=tier, life_s=life_s))
    made = [entry.who for entry in world.journal() if entry.kind == "invitation_made"]
    assert made == ["machine", operator.node]


def test_an_invitation_is_withdrawn_by_its_id_or_with_all_for_its_name(world: World) -> None:
    operator = world.member(Role.OPERATOR)
    one, lab, other = world.invitation(), [world.invitation(name="lab") for _ in range(2)], world.invitation()
    assert world.registrar.withdraw(one.id.hex()[:12]).invitations == (one.id.hex(),)
    withdrawn = world.ask(operator, Withdraw(which="lab"))
    assert isinstance(withdrawn, Withdrawn)
    assert set(withdrawn.invitations) == {each.id.hex() for each in lab}
    for gone in (one, *lab):
        device = new_identity()
        with pytest.raises(InvitationRefused, match="withdrawn"):
            world.ask(device, world.enrolment(device, gone))
    device = new_identity()
    world.ask(device, world.enrolment(device, other))
    for which in ("lab", one.id.hex(), other.id.hex(), other.id.hex()[:4], "%"):
        with pytest.raises(RequestRefused, match="No unused invitation"):
            world.registrar.withdraw(which)
    made = [entry.who for entry in world.journal() if entry.kind == "invitation_withdrawn"]
    assert made == ["machine", operator.node]


def test_the_journal_is_read_often_and_that_is_recorded_once_an_hour(world: World) -> None:
    auditor = world.member(Role.AUDITOR)
    for after in (0, 0, 2, 0):
        world.ask(auditor, ReadJournal(after_seq=after))
    assert world.kinds().count("journal_read") == 1
    later(world, 3600.0)
    world.ask(auditor, ReadJournal(after_seq=1))
    assert world.kinds().count("journal_read") == 2


def test_absurd_words_do_not_get_into_the_database(world: World) -> None:
    device, invitation = new_identity(), world.invitation()
    for name in ("", "x" * 65, "line\nbreak", "\x1b[31mred", "right\u202eleft", "end\n"):
        asked = msgspec.structs.replace(world.enrolment(device, invitation), name=name)
        with pytest.raises(SignatureInvalid, match="cannot be read"):
            world.ask(device, asked)
        with pytest.raises(RequestRefused, match="visible"):
            world.registrar.invite(name=name)
    operator = world.member(Role.OPERATOR)
    for node in ("", "0" * 63, "G" * 64, "0" * 64 + "\n"):
        with pytest.raises(SignatureInvalid, match="cannot be read"):
            world.ask(operator, Revoke(node=node, why="x"))


# --- the end of a membership ----------------------------------------------------------------------


def believed_by(world: World, who: Identity, passport: str) -> bool:
    reader = PassportReader(world.state.network, world.clock)
    reader.learn(world.word.revocations())
    try:
        reader.read(passport, holder=who.node)
    except FallowError:
        return False
    return True


def told(world: World) -> list[tuple[str, bool]]:
    """The list of revocations: who, and whether it came back."""
    found, _ = unseal(Envelopes.REVOCATIONS, RevocationList, world.word.revocations())
    return [(each.node, each.departure is Departure.RETURNED) for each in found.revocations]


def test_a_revoked_device_gets_nothing_more_and_its_passport_is_void(world: World) -> None:
    operator, device = world.member(Role.OPERATOR), world.member()
    passport = world.renewed(device).passport
    before = world.word.sequence()
    assert believed_by(world, device, passport)
    assert isinstance(world.ask(operator, Revoke(node=device.node, why="stolen")), Gone)
    assert world.word.sequence() == max(before + 1, int(world.clock.unix_s() * 1000))
    assert not believed_by(world, device, passport)
    for _ in range(3):
        with pytest.raises(RequestRefused, match="revoked: stolen"):
            world.renewed(device)
    assert world.kinds().count("renewal_refused") == 1
    with pytest.raises(InvitationRefused, match="revoked"):
        world.ask(device, world.enrolment(device, world.invitation()))


def test_a_registrar_whose_clock_was_set_back_revokes_what_it_issued_before(world: World) -> None:
    device = world.member()
    later(world, 1000.0)
    passport = world.renewed(device).passport
    later(world, -900.0)
    world.registrar.revoke(device.node, "stolen")
    later(world, 900.0)
    assert not believed_by(world, device, passport)


def test_a_second_revocation_changes_nothing(world: World) -> None:
    device = world.member()
    world.registrar.revoke(device.node, "stolen")
    sequence, kinds = world.word.sequence(), world.kinds()
    later(world, 5.0)
    assert world.registrar.revoke(device.node, "again").node == device.node
    assert (world.word.sequence(), world.kinds()) == (sequence, kinds)
    with pytest.raises(RequestRefused, match="Nobody"):
        world.registrar.revoke(new_identity().node, "who?")


def test_a_list_of_revocations_is_signed_and_forgets_what_matters_no_more(world: World) -> None:
    devices = [world.member() for _ in range(3)]
    for device in devices[:2]:
        world.registrar.revoke(device.node, "w" * 500)
    found, signer = unseal(Envelopes.REVOCATIONS, RevocationList, world.word.revocations())
    assert signer == world.state.network.registrar
    assert {revocation.node for revocation in found.revocations} == {device.node for device in devices[:2]}
    sequence = found.sequence
    assert sequence == int(world.clock.unix_s() * 1000) + 1, "it begins with the time, and rises by one at least"
    later(world, REVOCATION_KEPT_S)
    found, _ = unseal(Envelopes.REVOCATIONS, RevocationList, world.word.revocations())
    assert (found.revocations, found.sequence) == ((), sequence)


def test_both_accounts_jwts_name_the_revoked_and_get_newer_whatever_the_clock_does(world: World) -> None:
    def claims(text: str) -> dict[str, object]:
        part = text.split(".")[1]
        return msgspec.json.decode(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))

    device = world.member()
    before = world.word.accounts()
    world.registrar.revoke(device.node, "stolen")
    later(world, -5000.0)
    after = world.word.accounts()
    assert list(before) == list(after) == [world.state.network.account, account_nkey(world.state.system.node)]
    for account, text in after.items():
        first, second = claims(before[account]), claims(text)
        assert second["iat"] > first["iat"]  # type: ignore[operator]
        assert len(second["nats"]["revocations"]) == 1  # type: ignore[index]
        assert second["jti"] != first["jti"]


def test_a_device_that_left_renews_no_more_and_comes_back_by_a_new_invitation_only(world: World) -> None:
    device, invitation = new_identity(), world.invitation()
    world.ask(device, world.enrolment(device, invitation))
    world.ask(device, Leave())
    with pytest.raises(RequestRefused, match="has left"):
        world.renewed(device)
    with pytest.raises(InvitationRefused, match="left since"):
        world.ask(device, world.enrolment(device, invitation))
    assert isinstance(world.ask(device, world.enrolment(device, world.invitation())), Admitted)
    assert isinstance(world.renewed(device), Admitted)


def test_who_leaves_is_cut_at_once_and_who_comes_back_within_the_second_is_believed_again(world: World) -> None:
    """Its role may be another one then: what the first membership gave it stays void."""
    device = world.member(Role.COORDINATOR)
    first, before = world.renewed(device), world.word.sequence()
    later(world, 0.2)
    world.ask(device, Leave())
    assert world.word.sequence() > before, "everybody is told"
    assert told(world) == [(device.node, False)]
    assert not believed_by(world, device, first.passport)
    left = world.word.sequence()
    later(world, 0.2)
    world.ask(device, world.enrolment(device, world.invitation(Role.READER)))
    assert world.word.sequence() > left
    assert told(world) == [(device.node, True)]
    for _ in range(2):
        second = world.renewed(device)
        assert believed_by(world, device, second.passport)
        assert second.expires_unix_s - second.issued_unix_s == PASSPORT_LIFE_S
        assert not believed_by(world, device, first.passport)
        later(world, 0.3)
    world.ask(device, Leave())
    assert told(world) == [(device.node, False)]
    assert not believed_by(world, device, second.passport)


def test_who_comes_back_after_a_day_and_a_half_is_welcome_with_who_heard_of_it_late(world: World) -> None:
    """Hearers keep what they heard for a day from then; lists tell of it for a day from when it was."""
    device, other = world.member(), world.member()
    reader = PassportReader(world.state.network, world.clock)
    world.ask(device, Leave())
    later(world, REVOCATION_KEPT_S - 3600.0)
    world.registrar.revoke(other.node, "lost")
    reader.learn(world.word.revocations())
    assert reader.revoked(device.node)
    later(world, REVOCATION_KEPT_S / 2)
    world.ask(device, world.enrolment(device, world.invitation()))
    reader.learn(world.word.revocations())
    assert not reader.revoked(device.node) and reader.revoked(other.node)
    reader.read(world.renewed(device).passport, holder=device.node)


def test_a_clock_set_back_before_a_second_enrolment_revokes_what_was_issued_before(world: World) -> None:
    device = world.member()
    later(world, 1000.0)
    passport = world.renewed(device).passport
    later(world, -900.0)
    world.ask(device, world.enrolment(device, world.invitation()))
    world.registrar.revoke(device.node, "stolen")
    later(world, 900.0)
    assert not believed_by(world, device, passport)


def test_a_clock_ahead_for_a_moment_brings_the_bus_no_account_without_the_days_revocations(world: World) -> None:
    device = world.member()
    world.registrar.revoke(device.node, "stolen")
    later(world, REVOCATION_KEPT_S + 3600.0)
    for text in world.word.accounts().values():
        assert set(cut_by(text)) == {user_nkey(device.node)}


def test_the_bus_hears_of_who_left_for_two_hours(world: World) -> None:
    device = world.member()
    world.ask(device, Leave())
    later(world, BUS_DEPARTURES_KEPT_S - 1.0)
    assert [set(cut_by(text)) for text in world.word.accounts().values()] == [{user_nkey(device.node)}] * 2
    later(world, 1.0)
    assert [cut_by(text) for text in world.word.accounts().values()] == [{}] * 2
    assert told(world) == [(device.node, False)], "everybody else still does"


def test_who_was_shut_out_comes_first_on_the_list_and_who_has_nothing_left_is_not_on_it(world: World) -> None:
    """Leaving must not push others' revocations off the list; what ended by itself needs none."""
    away, asleep, leaver, back, revoked = (world.member() for _ in range(5))
    later(world, REVOCATION_KEPT_S + 1.0)
    for who in (leaver, back, revoked):
        world.renewed(who)
    world.registrar.revoke(revoked.node, "lost")
    for who in (asleep, leaver, back):
        later(world, 1.0)
        world.ask(who, Leave())
    world.ask(back, world.enrolment(back, world.invitation()))
    assert told(world) == [(revoked.node, False), (back.node, True), (leaver.node, False)]
    sequence = world.word.sequence()
    later(world, FORGOTTEN_S)
    assert world.registrar.retire_forgotten() >= 1
    assert (told(world), world.word.sequence()) == ([], sequence)
    assert away.node in {who.node for who in world.registrar.members() if who.left_unix_s is not None}


def test_where_the_network_is_is_told_once_for_every_move(world: World) -> None:
    list_of, _ = unseal(Envelopes.REVOCATIONS, RevocationList, world.word.revocations())
    assert list_of.places is not None and list_of.places.bus_urls == BUS_URLS
    world.word.tell_places()
    first = world.word.sequence()
    world.word.tell_places()
    assert world.word.sequence() == first
    world.places(("https://127.0.0.1:2",))
    world.word.tell_places()
    assert world.word.sequence() > first
    list_of, _ = unseal(Envelopes.REVOCATIONS, RevocationList, world.word.revocations())
    assert list_of.places is not None and list_of.places.registrar_urls == ("https://127.0.0.1:2",)


def test_a_forgotten_device_goes_dark_and_is_retired(world: World) -> None:
    forgotten, seen = world.member(), world.member()
    later(world, FORGOTTEN_S)
    world.renewed(seen)
    later(world, 1.0)
    with pytest.raises(RequestRefused, match="180 days"):
        world.renewed(forgotten)
    assert world.registrar.retire_forgotten() == 1
    assert world.registrar.retire_forgotten() == 0
    assert world.kinds().count("retired") == 1
    assert isinstance(world.renewed(seen), Admitted)


def test_people_name_members_by_name_or_by_the_beginning_of_the_key(world: World) -> None:
    one, two = world.member(name="tv"), world.member(name="tv")
    assert {who.node for who in world.registrar.named("tv")} == {one.node, two.node}
    assert [who.node for who in world.registrar.named(two.node[:12])] == [two.node]
    assert world.registrar.named(two.node[:7]) == []
    assert world.registrar.named("%") == []


def test_a_stranger_in_the_middle_of_enrolling_changes_no_role(world: World) -> None:
    """Somebody who knows a member's invitation, but has another key, cannot touch that member's enrolment."""
    invitation, member, stranger = world.invitation(), new_identity(), new_identity()
    world.ask(member, world.enrolment(member, invitation))
    asked = world.enrolment(member, invitation)
    assert isinstance(asked, Enrol)
    with pytest.raises(InvitationRefused):
        world.ask(stranger, asked)
    assert [who.node for who in world.registrar.members()] == [member.node]

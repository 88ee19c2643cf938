"""NATS's JWTs: the format of nats-io/jwt, and a reader that takes nothing else."""

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallow.domain.errors import PassportRefused
from fallow.policy.bus_rights import BusRights
from fallow.trust import jwt
from fallow.trust.keys import Identity, identity_of, user_nkey, verify
from tests.unit.fabric.support import STEADY

ACCOUNT, OPERATOR, SYSTEM, ALICE = (identity_of(bytes([index]) * 32) for index in range(1, 5))
RIGHTS = BusRights(publish=("a.b",), subscribe=("c.*",), may_answer=True)
NOW_S = 1_800_000_000.7


def passport(**changes: object) -> str:
    given = {"node": ALICE.node, "name": "n", "issued_unix_s": NOW_S, "life_s": 600, "rights": RIGHTS} | changes
    return jwt.user_jwt(ACCOUNT, **given)  # type: ignore[arg-type]


def read(text: str) -> jwt.Claims[jwt.UserBody]:
    return jwt.read_user(text, jwt.account_nkey(ACCOUNT.node))[0]


def part(text: str, index: int) -> dict:  # type: ignore[type-arg]
    encoded = text.split(".")[index]
    return json.loads(base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)))  # type: ignore[no-any-return]


def signed(body: bytes, signer: Identity = ACCOUNT, header: bytes = b'{"typ":"JWT","alg":"ed25519-nkey"}') -> str:
    def encode(data: bytes) -> str:
        return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

    start = f"{encode(header)}.{encode(body)}"
    return f"{start}.{encode(signer.sign(start.encode()))}"


def altered(**changes: object) -> bytes:
    """The claims of a good passport with some of them changed; `None` takes one away."""
    claims = part(passport(), 1)
    nats = claims["nats"]
    for name, value in changes.items():
        where = nats if name in nats or name in {"bearer_token", "issuer_account"} else claims
        if value is None:
            where.pop(name)
        else:
            where[name] = value
    return json.dumps(claims, separators=(",", ":")).encode()


def test_a_user_is_written_as_nats_has_it() -> None:
    text = passport(tags=("x:y=z",))
    assert part(text, 0) == {"typ": "JWT", "alg": "ed25519-nkey"}
    claims = part(text, 1)
    assert claims | {"jti": ""} == {
        "jti": "",
        "iat": 1_800_000_000,
        "exp": 1_800_000_600,
        "iss": jwt.account_nkey(ACCOUNT.node),
        "sub": user_nkey(ALICE.node),
        "name": "n",
        "nats": {
            "pub": {"allow": ["a.b"]},
            "sub": {"allow": ["c.*"]},
            "resp": {"max": 1, "ttl": 60_000_000_000},
            "subs": 256,
            "data": -1,
            "payload": 1 << 20,
            "allowed_connection_types": ["STANDARD"],
            "type": "user",
            "version": 2,
            "tags": ["x:y=z"],
        },
    }
    assert len(claims["jti"]) == 52 and claims["jti"].isalnum() and "=" not in text
    start, _, signature = text.rpartition(".")
    verify(ACCOUNT.node, base64.urlsafe_b64decode(signature + "=="), start.encode())


def test_an_account_tells_everything_but_what_is_named_apart() -> None:
    text = jwt.account_jwt(OPERATOR, ACCOUNT.node, name="home", issued_unix_s=NOW_S, revoked={ALICE.node: NOW_S})
    claims = part(text, 1)
    assert claims["iss"].startswith("O") and claims["sub"] == jwt.account_nkey(ACCOUNT.node)
    assert claims["nats"]["revocations"] == {user_nkey(ALICE.node): 1_800_000_000}
    assert claims["nats"]["default_permissions"] == {"pub": {"deny": [">"]}, "sub": {"deny": [">"]}}
    assert claims["nats"]["limits"]["disallow_bearer"] is True and claims["nats"]["limits"]["leaf"] == 0
    assert claims["nats"]["limits"]["disk_storage"] > 0
    assert (claims["nats"]["type"], claims["nats"]["version"]) == ("account", 2)
    system = part(jwt.system_account_jwt(OPERATOR, SYSTEM.node, name="s", issued_unix_s=NOW_S, revoked={}), 1)
    assert "disk_storage" not in system["nats"]["limits"]
    operator = part(jwt.operator_jwt(OPERATOR, system=SYSTEM.node, name="o", issued_unix_s=NOW_S), 1)
    assert operator["iss"] == operator["sub"] == jwt.operator_nkey(OPERATOR.node)
    assert operator["nats"] == {"system_account": jwt.account_nkey(SYSTEM.node), "type": "operator", "version": 2}


def test_two_accounts_of_one_second_have_two_ids() -> None:
    """nats-server takes an update with the id that it has for none."""
    made = [
        jwt.account_jwt(OPERATOR, ACCOUNT.node, name="home", issued_unix_s=NOW_S, revoked=revoked)
        for revoked in ({}, {ALICE.node: NOW_S})
    ]
    assert part(made[0], 1)["jti"] != part(made[1], 1)["jti"]


def test_who_may_say_or_hear_nothing_is_not_given_everything() -> None:
    claims = part(passport(rights=BusRights(publish=(), subscribe=())), 1)["nats"]
    assert claims["pub"] == claims["sub"] == {"deny": [">"]} and "resp" not in claims


def test_what_was_written_is_read() -> None:
    claims, node = jwt.read_user(passport(), jwt.account_nkey(ACCOUNT.node))
    assert node == ALICE.node and claims.exp == claims.iat + 600 and claims.nats.pub.allow == ("a.b",)
    assert jwt.peek(passport()) == (claims, node)


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("nothing", ""),
        ("no parts", "abc"),
        ("too long", passport() + "A" * jwt.USER_BYTES_MAX),
        ("four parts", passport() + ".AAAA"),
        ("no signature", passport().rpartition(".")[0] + "."),
        ("padding", passport() + "=="),
        ("white space", passport() + "\n"),
        ("stray bits", passport()[:-1] + chr(ord(passport()[-1]) + 1)),
        ("algorithm none", signed(altered(), header=b'{"typ":"JWT","alg":"none"}')),
        ("the old algorithm", signed(altered(), header=b'{"typ":"JWT","alg":"ed25519"}')),
        ("HMAC", signed(altered(), header=b'{"typ":"JWT","alg":"HS256"}')),
        ("header in other words", signed(altered(), header=b'{"alg":"ed25519-nkey","typ":"JWT"}')),
        ("signed by another", signed(altered(), signer=OPERATOR)),
        ("signed by its holder", signed(altered(), signer=ALICE)),
        ("another issuer named", signed(altered(iss=jwt.account_nkey(OPERATOR.node)))),
        ("an account", signed(altered(type="account"))),
        ("version 1", signed(altered(version=1))),
        ("version 3", signed(altered(version=3))),
        ("no end", signed(altered(exp=None))),
        ("for two hours", signed(altered(exp=1_800_007_200))),
        ("ends before it begins", signed(altered(exp=1_799_999_999))),
        ("of an account's key", signed(altered(sub=jwt.account_nkey(ALICE.node)))),
        ("of no key", signed(altered(sub="U" + "A" * 55))),
        ("a bearer", signed(altered(bearer_token=True))),
        ("by a signing key", signed(altered(issuer_account=jwt.account_nkey(ACCOUNT.node)))),
        ("unknown claims", signed(altered(aud="x"))),
        ("a long name", signed(altered(name="n" * 101))),
        ("no JSON", signed(b"{")),
        ("deep JSON", signed(b"[" * 5000)),
        ("no UTF-8", signed(b'{"iss":"\xff"}')),
        ("huge numbers", signed(altered(exp=10**400))),
        ("text for a number", signed(altered(iat="1800000000"))),
    ],
)
def test_everything_else_is_refused_by_name(case: str, text: str) -> None:
    with pytest.raises(PassportRefused):
        read(text)
        pytest.fail(case)


def test_an_operators_and_an_accounts_document_are_no_passports() -> None:
    for text in (
        jwt.operator_jwt(ACCOUNT, system=SYSTEM.node, name="o", issued_unix_s=NOW_S),
        jwt.account_jwt(ACCOUNT, ACCOUNT.node, name="a", issued_unix_s=NOW_S, revoked={}),
    ):
        with pytest.raises(PassportRefused):
            read(text)


@STEADY
@given(at=st.integers(0, 10_000), byte=st.sampled_from("AZaz09-_.=\n"))
def test_no_single_character_may_differ(at: int, byte: str) -> None:
    text = passport()
    changed = text[: at % len(text)] + byte + text[at % len(text) + 1 :]
    if changed != text:
        with pytest.raises(PassportRefused):
            read(changed)


@STEADY
@given(text=st.text(max_size=300))
def test_any_text_is_refused_by_name(text: str) -> None:
    with pytest.raises(PassportRefused):
        read(text)
    assert jwt.peek(text) is None


@STEADY
@given(body=st.binary(max_size=300))
def test_any_well_signed_bytes_are_refused_by_name(body: bytes) -> None:
    with pytest.raises(PassportRefused):
        read(signed(body))

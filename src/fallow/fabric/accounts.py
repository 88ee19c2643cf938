"""Gives a running NATS server a newer JWT of an account, the fleet's or its own: how a revocation reaches it.

Rules
- The server cuts the connections of whom the new JWT revokes before it answers, and lets them in no more.
- The server takes a JWT that was issued earlier as willingly as a later one: who brings it counts.
"""

from typing import Final

import msgspec

from fallow.domain.errors import RequestRefused
from fallow.fabric.nats_bus import NatsBus

PUSH_TIMEOUT_S: Final = 2.0


class _Outcome(msgspec.Struct):
    code: int = 0
    message: str = ""
    description: str = ""


class _Reply(msgspec.Struct):
    data: _Outcome | None = None
    error: _Outcome | None = None


async def push_account(bus: NatsBus, account: str, account_jwt: str) -> None:
    """Replace the JWT of `account` (`A…`), and see that it holds.

    `bus` is a connection to the system account (`trust/passports.py: issue_claims`). Raises `BusUnavailable`,
    `BusTimeout`, and `RequestRefused` when the server does not take it.
    """
    reply = await _ask(bus, "$SYS.REQ.CLAIMS.UPDATE", account_jwt.encode())
    try:
        answer = msgspec.json.decode(reply, type=_Reply)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise RequestRefused("the control bus answered a new account with what cannot be read") from None
    if answer.error is not None or answer.data is None or answer.data.code != 200:
        said = answer.error or answer.data or _Outcome()
        raise RequestRefused(f"the control bus refused a new account: {said.description or said.message}")
    held = await _ask(bus, f"$SYS.REQ.ACCOUNT.{account}.CLAIMS.LOOKUP", b"")
    if held != account_jwt.encode():
        raise RequestRefused("the control bus took a new account and kept another: does somebody else bring it some?")


async def _ask(bus: NatsBus, subject: str, message: bytes) -> bytes:
    return await bus.request(subject, message, PUSH_TIMEOUT_S)

"""Kinds of id. A kind is a type, so that a session id never travels as a node id."""

from typing import NewType

NodeId = NewType("NodeId", str)
"""Lower-case hex of a device's Ed25519 public key; also its link endpoint id."""

SessionId = NewType("SessionId", str)
"""One conversation's place in the fleet: 32 lower-case hex digits, drawn by the gateway."""

Digest = NewType("Digest", str)
"""Lower-case hex SHA-256 of a blob. A model's digest is that of its manifest's bytes."""

ModelName = NewType("ModelName", str)
"""What people and API clients call a model, for example `smollm2-135m-instruct`."""

VISITS_MAX = 16
"""Stages that one session may have on one device; a hex digit tells them apart."""


def at_visit(session: SessionId, visit: int) -> SessionId:
    """The name under which a device holds a session's stage, when the session's chain comes to it again (`Hop.visit`).

    Visits have different names, and the 0th has the session's own; `at_visit(at_visit(name, visit), visit)` is `name`.
    """
    return SessionId(f"{int(session[0], 16) ^ visit:x}{session[1:]}") if visit else session


def same_conversation(one: SessionId, other: SessionId) -> bool:
    """Whether two names are one session's, of whichever visits."""
    return one[1:] == other[1:]

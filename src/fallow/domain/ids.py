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

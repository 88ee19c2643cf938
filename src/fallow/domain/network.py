"""A network's public description: what an invitation pins by its SHA-256, and a device keeps for good."""

import msgspec

from fallow.domain.ids import NodeId

REGISTRAR_NAME = "fallow-registrar"
BUS_NAME = "fallow-bus"
"""The names in the servers' certificates. Clients check these, whatever the address is that they dial: addresses of
devices at home change, and the network's own authority signs nothing but these two."""


class Network(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`network.json`. Public; holds no secret."""

    format: int
    name: str
    cell: str
    authority_pem: str
    """The certificate that signed the certificates of the registrar and of the bus."""
    account: str
    """Public nkey (`A…`) of the NATS account that signs passports."""
    registrar: NodeId
    """The key that signs revocation lists."""
    tuf_root: str
    """The first `root.json` of the council's repository, as it was signed."""


class Places(msgspec.Struct, frozen=True, kw_only=True):
    """Where a network can be reached now; unlike its description, this changes."""

    registrar_urls: tuple[str, ...]
    bus_urls: tuple[str, ...]

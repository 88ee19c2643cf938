"""What the council decides, and whether a device may work under it.

A *charter* is what one check of the council's repository (TUF) gave. A *lease* is how long a device may go on with it.
A *halt* is one member's word that everything stops. `policy/lease.py` decides; `trust/lease_keeper.py` asks.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated

import msgspec

from fallow.domain.fleet import Tier
from fallow.domain.ids import Digest, ModelName, NodeId
from fallow.domain.model import Quantisation

LEASE_S = 600.0
LEASE_MIN_S = 5.0
LEASE_MAX_S = 24 * 3600.0

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]


class FleetLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What no device of the fleet does, whatever its owner allows."""

    session_tokens_max: Annotated[int, msgspec.Meta(ge=1, le=1 << 24)] = 1 << 20
    """Of one session, prompt and completion together."""
    sessions_per_device_max: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)] = 4096


class Quarantine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many devices may be taken out of service on suspicion: an alarm must not become a weapon."""

    devices_per_hour_max: Annotated[int, msgspec.Meta(ge=0, le=1 << 20)] = 10
    fleet_share_max: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.1


class FleetPolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What k of n council members signed. A TUF target of the quorum role (`policy.json`)."""

    epoch: Count
    """Rises with every policy. A device that has seen one takes no lower one; resuming after a halt needs a higher."""
    allowed_models: tuple[Digest, ...] | None = None
    """`None`: every model that a delegated publisher signed. Else these of them."""
    limits: FleetLimits = FleetLimits()
    quarantine: Quarantine = Quarantine()
    version_min: str = "0"
    """The oldest release of Fallow that may work, such as `0.3.0`."""
    tier_min: Tier = Tier.KEYED
    """Devices below it are placed nothing."""
    lease_s: Annotated[float, msgspec.Meta(ge=LEASE_MIN_S, le=LEASE_MAX_S)] = LEASE_S


class ModelFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What coordinators place and route a model by. A publisher signs it beside the digest of the manifest."""

    name: ModelName
    manifest_bytes: int
    quantisation: Quantisation
    layer_bytes: tuple[int, ...]
    """Of each layer's file, in their order."""
    embedding_bytes: int
    head_bytes: int
    tied_head: bool
    hidden_size: int
    kv_head_count: int
    head_dim: int


class SignedModel(msgspec.Struct, frozen=True):
    """What publishers signed of a model that the policy allows."""

    rank: int
    """Of the first publisher who signed it, in the council's order: of two models of one name, the lower counts."""
    figures: tuple[ModelFigures, ...]
    """By each publisher whose signature brings some; the same ones, where all of them are honest."""


class Charter(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one check, every signature verified."""

    policy: FleetPolicy
    council: Mapping[str, NodeId]
    """TUF key id to public key of the members who may halt, as of the trusted root."""
    root_version: int
    timestamp_version: int
    timestamp_expires_unix_s: float
    models: frozenset[Digest]
    """Digests of manifests that publishers signed and the policy allows."""
    signed: Mapping[Digest, SignedModel] = {}
    """What was signed of each of these models."""
    releases: frozenset[str] = frozenset()
    """Versions of Fallow that publishers signed."""


class Halt(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One council member's word that everything stops, in an envelope `fallow/halt` signed by that member.

    It holds while its signer is in the council and no policy of a higher epoch than its own was signed by the quorum.
    """

    network: str
    """SHA-256 of the network's descriptor: a halt of one network is none of another."""
    epoch: Count
    """Of the policy that it stops."""
    why: Annotated[str, msgspec.Meta(min_length=1, max_length=1000)]
    issued_unix_s: float


class Standing(StrEnum):
    """Whether a device may work, and if not, why."""

    WORKING = "working"
    NO_LEASE = "no_lease"
    """No fresh word from the council's repository: it stops until there is one."""
    HALTED = "halted"
    REVOKED = "revoked"
    TOO_OLD = "too_old"
    """This release of Fallow is below the policy's `version_min`."""

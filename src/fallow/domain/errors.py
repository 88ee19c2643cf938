"""Named errors. Every edge answers hostile or broken input with one of these.

`code` is stable and machine-readable: it travels in frames, bus replies and API bodies. The message is for a
person: what happened, why, and what to do next.
"""

from typing import ClassVar


class FallowError(Exception):
    """The root of every error that Fallow raises on purpose."""

    code: ClassVar[str] = "internal"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ConfigError(FallowError):
    """A configuration file, variable or flag that cannot be used."""

    code = "bad_config"


# --- models -------------------------------------------------------------------------------------


class ModelError(FallowError):
    """A model file that is broken, lies about itself, or is of a kind that Fallow does not serve."""

    code = "bad_model"


class UnknownModel(FallowError):
    """A model name or digest that nobody here has."""

    code = "model_not_found"


class BlobCorrupt(FallowError):
    """Bytes that do not have the digest that they were asked for by."""

    code = "blob_corrupt"


class BlobUnavailable(FallowError):
    """No peer could deliver a blob in time."""

    code = "blob_unavailable"


# --- engine -------------------------------------------------------------------------------------


class EngineError(FallowError):
    """A stage refused a call or failed inside it."""

    code = "engine_failed"


class EngineLost(EngineError):
    """The worker process died; every session that it held is gone."""

    code = "engine_lost"


class KvExhausted(EngineError):
    """The KV cache has no room for another reservation. A refusal, not a failure."""

    code = "kv_exhausted"


class UnknownSession(EngineError):
    """A step, rewind or free for a session that this stage does not hold."""

    code = "unknown_session"


class PositionMismatch(EngineError):
    """Rows that do not continue at the stage's position, or exceed the reservation."""

    code = "position_mismatch"


class NumericFault(EngineError):
    """Non-finite activations: the stage's output would be garbage."""

    code = "numeric_fault"


# --- fabric -------------------------------------------------------------------------------------


class FabricError(FallowError):
    """Something between two processes went wrong."""

    code = "fabric_failed"


class FrameError(FabricError):
    """Bytes that are not a valid frame: truncated, oversized, of unknown kind, or ill-typed."""

    code = "bad_frame"


class ProtocolVersionMismatch(FabricError):
    """Two peers that share no protocol version."""

    code = "protocol_version"


class LinkClosed(FabricError):
    """The peer closed the link, stopped answering, or was never reached."""

    code = "link_closed"


class SealBroken(LinkClosed):
    """What came over the sealed relay is not what the peer sent next: altered, replayed, reordered, lost, or forged."""

    code = "seal_broken"


class BusUnavailable(FabricError):
    """The control bus cannot be reached at present."""

    code = "bus_unavailable"


class BusTimeout(FabricError):
    """Nobody answered a request on the bus in time."""

    code = "bus_timeout"


class LeaseUnsupported(FabricError):
    """The control bus has no JetStream, so that nobody can hold a lease on it."""

    code = "lease_unsupported"


class BusMessageError(FabricError):
    """A bus message that cannot be believed: not decodable, absurd numbers, or a sender that is not who it says."""

    code = "bad_message"


# --- sessions -----------------------------------------------------------------------------------


class StageRefused(FallowError):
    """A node would not open a stage. `reason` is the code of the refusal."""

    code = "stage_refused"

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class NoRoute(FallowError):
    """No devices that are present can serve the model at present."""

    code = "no_capacity"


class ContextExceeded(FallowError):
    """Prompt and requested completion do not fit the model's context."""

    code = "context_length_exceeded"


class BadRequest(FallowError):
    """A request whose content cannot be served. `param` names the offending field."""

    code = "invalid_request"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


# --- trust --------------------------------------------------------------------------------------


class TrustError(FallowError):
    """Something that had to be shown was not: a signature, a right, a lease."""

    code = "not_trusted"


class SignatureInvalid(TrustError):
    """A document whose signature is not its signer's, or that is of another kind than expected."""

    code = "bad_signature"


class PassportRefused(TrustError):
    """A passport that is missing, of another network, of another key, expired, or revoked."""

    code = "not_admitted"


class GrantRefused(TrustError):
    """A grant that does not allow what is asked."""

    code = "grant_refused"


class InvitationRefused(TrustError):
    """An invitation that is unknown, used, expired, or of another network."""

    code = "invitation_refused"


class RequestRefused(TrustError):
    """A request to the registrar whose sender may not make it."""

    code = "request_refused"


class MembershipEnded(RequestRefused):
    """A request of somebody who was revoked, left or was retired: only a new invitation changes that, if anything."""

    code = "membership_ended"


class RegistrarUnavailable(TrustError):
    """The registrar cannot be reached, or cannot answer now. Nothing is known to be wrong with the request."""

    code = "registrar_unavailable"


class CharterInvalid(TrustError):
    """The council's repository failed verification: rolled back, frozen, mixed, wrongly or too little signed."""

    code = "charter_invalid"


class PublishedTooOften(CharterInvalid):
    """A publisher's key has put lists in force faster than it may. The same publication is taken later."""

    code = "published_too_often"


class CharterUnavailable(TrustError):
    """The council's repository cannot be reached. Nothing is known to be wrong with it."""

    code = "charter_unavailable"


class NotWorking(TrustError):
    """This device, or the whole network, may not work now. `standing` says why."""

    code = "not_working"

    def __init__(self, message: str, standing: str) -> None:
        super().__init__(message)
        self.standing = standing


class JournalBroken(TrustError):
    """An entry of the journal was changed, removed or added: the chain of hashes does not hold."""

    code = "journal_broken"

"""What an owner agrees to before a device is lent, in plain words, signed by the device and kept by the registrar.

Rules
- The words are whole: nothing that they refer to has to be looked up. The signed document holds them, so that a record
  of consent needs no version table to be understood years later.
- Other words are another consent: their digest tells which.
"""

import hashlib
from typing import Annotated, Final

import msgspec

from fallow.domain.credentials import Role
from fallow.domain.errors import SignatureInvalid
from fallow.domain.ids import NodeId
from fallow.trust.envelope import Kind, seal, unseal
from fallow.trust.keys import Identity

WORDS_MAX_CHARS: Final = 6000
NEEDED_FROM: Final = frozenset({Role.NODE})
"""Whose devices are lent: their owners are asked."""

_WORDS: Final = """\
You are about to lend this device, {device}, to the network "{network}".

What runs: the Fallow agent, and a worker process that computes parts of AI models. It runs only models that the
network's council has signed, and no code that it is sent. The worker has low priority, no network, and reads
nothing but the model files that Fallow keeps in its own folder.

For whom: people who may use the API of "{network}". The operator of the network decides who that is.

What is lent: processor time, {memory}, space on the disk for parts of models, and the traffic of your
connection that the work takes. The network's coordinators see this device's name, addresses, speed, load, and
when it is usually free.

Who can see prompts: what passes through this device is numbers from inside a model. From them, text that people
wrote can partly be guessed: treat it as confidential. In turn, devices of other owners see the same of requests
that they work on. The links are encrypted; nobody on the way can read them.

How it is stopped: Ctrl-C, or ending the program, at any time and without asking anybody. Any one member of the
council can halt the whole network, and this device stops by itself when it does not hear from the council for
some time.

How to leave: `fallow leave` ends the membership at once; then delete the folder {folder} to remove all that
Fallow keeps. A device that is not seen for 180 days is forgotten.

What is recorded for good: this consent with the device's public key, its name, when it was admitted, and when
it left or was revoked. Registrar of the network: {registrar}. Network: {digest}.
"""


class Consent(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the device signs (`fallow/consent`)."""

    network: str
    """SHA-256 of `network.json`."""
    role: Role
    words: Annotated[str, msgspec.Meta(min_length=1, max_length=WORDS_MAX_CHARS)]


class Lent(msgspec.Struct, frozen=True, kw_only=True):
    """What the words need to know of the device."""

    device: str
    memory: str
    """Such as `up to 4 GiB of memory`."""
    folder: str


def words_for(network: str, digest: str, registrar: NodeId, lent: Lent) -> str:
    """The words that the owner of a device is shown."""
    return _WORDS.format(
        network=network,
        digest=digest,
        registrar=registrar,
        device=lent.device[:100],
        memory=lent.memory[:200],
        folder=lent.folder[:400],
    )


def digest_of(words: str) -> str:
    """Which words somebody agreed to."""
    return hashlib.sha256(words.encode()).hexdigest()


def sign_consent(device: Identity, network: str, role: Role, words: str) -> bytes:
    """The device's signature under the words, after its owner said yes."""
    return seal(Kind.CONSENT, Consent(network=network, role=role, words=words), device)


def read_consent(envelope: bytes, device: NodeId, network: str, role: Role) -> Consent:
    """A consent of that device to that network. Raises `SignatureInvalid` for any other."""
    consent, signer = unseal(Kind.CONSENT, Consent, envelope)
    if signer != device or consent.network != network or consent.role is not role:
        raise SignatureInvalid("expected the consent of this device to this network, got another's")
    return consent

"""Halts: one council member's signed word that everything stops, made, read and kept.

Rules
- A halt is an envelope `fallow/halt`, so it may come by any way: the registrar, the bus, a text that somebody typed in.
- It is sticky: the book writes it to disk (fsync) before anybody acts on it, and reads it back after a restart. Nothing
  here takes one out because of time, only because it holds no more (`policy/council.py`: a higher epoch, or a signer
  voted out).
- Before each change a book reads its file again, so that a command can add a halt beside a running process.
- A book keeps one halt per signer, the one of the highest epoch: a stolen key fills no disk.
- The file is MessagePack: a list of envelopes. It is public, and is checked again whenever it is read.
"""

import base64
import binascii
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from fallow.domain.charter import Halt
from fallow.domain.errors import SignatureInvalid
from fallow.domain.ids import NodeId
from fallow.policy.council import MEMBERS_MAX, halt_holds
from fallow.private_file import write_durably
from fallow.trust.envelope import ENVELOPE_MAX_BYTES, Kind, seal, unseal
from fallow.trust.keys import Identity

HALT_MAX_BYTES = 8 * 1024
HALT_TEXT_PREFIX = "fallow-halt-"
WHY_MAX_CHARS = 1000
HALTS_FILE_MAX_BYTES = MEMBERS_MAX * (HALT_MAX_BYTES + 16)

assert HALT_MAX_BYTES <= ENVELOPE_MAX_BYTES

log = logging.getLogger(__name__)


def seal_halt(member: Identity, network: str, epoch: int, why: str, now_unix_s: float) -> bytes:
    """A halt of a network, signed by one council member."""
    return seal(Kind.HALT, Halt(network=network, epoch=epoch, why=why, issued_unix_s=now_unix_s), member)


def read_halt(envelope: bytes, network: str) -> tuple[Halt, NodeId]:
    """A halt and who signed it. Raises `SignatureInvalid`: not a halt, altered, or of another network.

    Whether it holds is `policy.council.halt_holds`'s.
    """
    if len(envelope) > HALT_MAX_BYTES:
        raise SignatureInvalid(f"expected a halt of up to {HALT_MAX_BYTES} bytes, got {len(envelope)}")
    halt, signer = unseal(Kind.HALT, Halt, envelope)
    if halt.network != network:
        raise SignatureInvalid("a halt of another network")
    return halt, signer


def halt_text(envelope: bytes) -> str:
    """A halt as a text that can be mailed, read out or printed."""
    return HALT_TEXT_PREFIX + base64.urlsafe_b64encode(envelope).rstrip(b"=").decode()


def halt_of_text(text: str) -> bytes:
    """The envelope in a text of `halt_text`; spaces and line breaks do not matter. Raises `SignatureInvalid`."""
    packed = "".join(text.split())
    if not packed.startswith(HALT_TEXT_PREFIX) or len(packed) > 2 * HALT_MAX_BYTES:
        raise SignatureInvalid(f"expected a text that begins with {HALT_TEXT_PREFIX}")
    body = packed.removeprefix(HALT_TEXT_PREFIX)
    try:
        return base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise SignatureInvalid("a halt's text that was not copied whole") from None


def decode_halts(data: bytes, network: str) -> tuple[tuple[bytes, NodeId, Halt], ...]:
    """What can be believed of a file of halts: envelope, signer, halt. What cannot is left out, and stops nobody.

    Raises `SignatureInvalid` when it is no list of envelopes at all.
    """
    if len(data) > HALTS_FILE_MAX_BYTES:
        raise SignatureInvalid(f"expected halts of up to {HALTS_FILE_MAX_BYTES} bytes, got {len(data)}")
    try:
        envelopes = msgspec.msgpack.decode(data, type=list[bytes])
    except (msgspec.MsgspecError, RecursionError) as error:
        raise SignatureInvalid(f"expected a list of halts, got what cannot be read: {error}") from None
    if len(envelopes) > MEMBERS_MAX:
        raise SignatureInvalid(f"expected up to {MEMBERS_MAX} halts, got {len(envelopes)}")
    found = []
    for envelope in envelopes:
        try:
            halt, signer = read_halt(envelope, network)
        except SignatureInvalid:
            continue
        found.append((envelope, signer, halt))
    return tuple(found)


class HaltBook:
    """The halts that a process knows, in a file. Not for two writers at one moment."""

    def __init__(self, path: Path, network: str) -> None:
        """Raises `SignatureInvalid` when there is a file that cannot be read: no halt may be lost silently."""
        self._path = path
        self._network = network
        self._halts: dict[NodeId, tuple[bytes, Halt]] = {}
        self.reload()

    def reload(self) -> None:
        """Read the file again, for a book that another process may have written. Raises `SignatureInvalid`."""
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            self._halts = {}
            return
        self._halts = {signer: (envelope, halt) for envelope, signer, halt in decode_halts(data, self._network)}

    def holding(self, council: Iterable[NodeId], epoch: int) -> tuple[tuple[NodeId, Halt], ...]:
        """The halts that hold under that council and epoch, with their signers."""
        members = frozenset(council)
        return tuple(
            (signer, halt)
            for signer, (_, halt) in self._halts.items()
            if halt_holds(halt, signer, members, self._network, epoch)
        )

    def envelopes(self) -> tuple[bytes, ...]:
        return tuple(envelope for envelope, _ in self._halts.values())

    def add(self, envelope: bytes, council: Mapping[str, NodeId], epoch: int) -> Halt | None:
        """Keep a halt that holds, on disk before this returns; `None` when it does not hold, or says nothing new.

        Raises `SignatureInvalid` as `read_halt` does.
        """
        halt, signer = read_halt(envelope, self._network)
        self._refresh()
        if not halt_holds(halt, signer, council.values(), self._network, epoch):
            return None
        known = self._halts.get(signer)
        if known is not None and known[1].epoch >= halt.epoch:
            return None
        self._write(self._halts | {signer: (envelope, halt)})
        return halt

    def prune(self, council: Mapping[str, NodeId], epoch: int) -> tuple[Halt, ...]:
        """Forget the halts that hold no more under a charter that was verified, and say which."""
        self._refresh()
        members = frozenset(council.values())
        kept = {
            signer: (envelope, halt)
            for signer, (envelope, halt) in self._halts.items()
            if halt_holds(halt, signer, members, self._network, epoch)
        }
        gone = tuple(halt for signer, (_, halt) in self._halts.items() if signer not in kept)
        if gone:
            self._write(kept)
        return gone

    def _refresh(self) -> None:
        """Before a change: `fallow council obey` may have written a halt that this process has not heard of."""
        try:
            self.reload()
        except SignatureInvalid as error:
            log.error("%s: %s cannot be read, and is written anew: %s", error.code, self._path, error)

    def _write(self, halts: dict[NodeId, tuple[bytes, Halt]]) -> None:
        write_durably(self._path, msgspec.msgpack.encode([envelope for envelope, _ in halts.values()]))
        self._halts = halts

"""What a member holds every proposal against: which network it is, and the newest that this machine has seen of it.

Rules
- A pin only moves forward along verified roots and versions of lists: no member is shown a change as built on a council
  that was replaced, or on a list from before an entry was withdrawn.
- A list of before is told by its version. That begins anew for a publisher who was removed and comes back after the
  registrar got another online key, which a member who saw neither cannot tell from a list of before. With another key
  than the one that was pinned it can be no list of before, since that key never signed one. With the same key it is
  refused, and the words say how to go on: a publisher who comes back has a new key.
"""

import msgspec
from tuf.api.metadata import Root, Targets

from fallow.domain.errors import CharterInvalid
from fallow.domain.ids import NodeId
from fallow.private_file import write_durably
from fallow.trust.council import tuf_format as tuf
from fallow.trust.council.files import CouncilPaths
from fallow.trust.council.proposals import Base, first_root_payload, verify_base


class Pin(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a member holds every proposal against."""

    name: str
    network: str
    first_root: str
    version: int = 1
    newest_root: str | None = None
    """SHA-256 of what the newest council that this member saw signed; `None`: only the first is known."""
    epoch: int = 0
    """Of the newest policy that this member saw."""
    lists: dict[str, int] = {}
    """The versions of the policy's and the publishers' lists in the newest base that this member saw, by role."""
    publishers: dict[str, NodeId] = {}
    """Who signed the latter."""


def pin_of(paths: CouncilPaths) -> Pin | None:
    """Raises `CharterInvalid` for a damaged one."""
    try:
        return msgspec.json.decode(paths.pin.read_bytes(), type=Pin)
    except FileNotFoundError:
        return None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CharterInvalid(f"expected a pin in {paths.pin}, got what cannot be read: {error}") from None


def write_pin(paths: CouncilPaths, pin: Pin) -> None:
    write_durably(paths.pin, msgspec.json.encode(pin))


def check_pin(pin: Pin, base: Base) -> Pin:
    """The pin, moved to the newest root of a base (verified here). Raises `CharterInvalid` when they part ways."""
    _, targets, policy = verify_base(base)
    digests = [tuf.sha256(first_root_payload(text)) for text in base.roots]
    if digests[0] != pin.first_root:
        raise CharterInvalid("this is of another network than the one that this machine's member belongs to")
    if len(digests) < pin.version or (pin.newest_root is not None and digests[pin.version - 1] != pin.newest_root):
        raise CharterInvalid("this is built on a council that is not, or no longer, the one that this member knows")
    texts = {Targets.type: base.targets, **base.delegated}
    lists = {role: tuf.read(Targets, text).signed.version for role, text in texts.items()}
    publishers = tuf.publishers(targets)
    for role, version in lists.items():
        if version < pin.lists.get(role, 0) and not _begins_anew(pin, base, role, publishers):
            raise CharterInvalid(
                f"this is built on version {version} of {role}, and this member has seen version {pin.lists[role]}: "
                "what was withdrawn since would come back. Propose it anew. If this publisher was removed and came "
                "back, have the council give them a new key"
            )
    epoch = max(pin.epoch, policy.epoch)
    return msgspec.structs.replace(
        pin, version=len(digests), newest_root=digests[-1], epoch=epoch, lists=lists, publishers=publishers
    )


def _begins_anew(pin: Pin, base: Base, role: str, publishers: dict[str, NodeId]) -> bool:
    """Whether a list of a lower version is another one of that name: of another key, under another online key."""
    if role == Targets.type or pin.publishers.get(role) in {None, publishers[role]}:
        return False
    roots = (tuf.read(Root, text).signed for text in base.roots[pin.version - 1 :])
    return len({frozenset(tuf.online_keys(root)) for root in roots}) > 1

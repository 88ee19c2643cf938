"""What is in force, looked up and verified, for `fallow council status` and for resuming."""

from datetime import UTC, datetime

from tuf.api.metadata import Root, Targets, Timestamp

from fallow.cli.council_place import Place
from fallow.cli.council_words import Publisher, Situation
from fallow.domain.charter import Halt
from fallow.domain.ids import NodeId
from fallow.policy.council import halt_holds
from fallow.trust.council import tuf_format as tuf
from fallow.trust.council.client import HALTS_PATH
from fallow.trust.council.fetch import RepositoryFetcher
from fallow.trust.council.files import read_base
from fallow.trust.council.halts import HALTS_FILE_MAX_BYTES, decode_halts
from fallow.trust.council.proposals import verify_base
from fallow.trust.keys import load


def look(place: Place) -> Situation:
    """Raises `CharterInvalid`, `CharterUnavailable`, `ConfigError`."""
    fetcher = place.fetcher()
    base = read_base(fetcher)
    root, targets, policy = verify_base(base)
    timestamp = tuf.read(Timestamp, fetcher.get("metadata/timestamp.json", tuf.TIMESTAMP_MAX_BYTES) or b"")
    tuf.verify_by(root, Timestamp.type, timestamp)
    lists = {role: tuf.read(Targets, text).signed for role, text in base.delegated.items()}
    names = tuf.member_names(root)
    try:
        own = load(place.paths.member_key).node
    except FileNotFoundError:
        own = None
    return Situation(
        network=place.name,
        policy=policy,
        members=names,
        threshold=root.roles[Root.type].threshold,
        publishers=[
            Publisher(
                *tuf.kind_and_name(role), key, frozenset(tuf.listed(role, lists[role].targets)), lists[role].expires
            )
            for role, key in tuf.publishers(targets).items()
        ],
        root_expires=min(root.expires, targets.expires),
        timestamp_expires=timestamp.signed.expires,
        halts=[(names.get(who) or who[:8], halt) for who, halt in halts_in_force(fetcher, root, place, policy.epoch)],
        own=own,
        now=datetime.now(UTC),
    )


def halts_in_force(fetcher: RepositoryFetcher, root: Root, place: Place, epoch: int) -> list[tuple[NodeId, Halt]]:
    """Raises `SignatureInvalid` for a damaged list of them."""
    data = fetcher.get(HALTS_PATH, HALTS_FILE_MAX_BYTES)
    if data is None or not place.network:
        return []
    members = frozenset(tuf.council_of(root).values())
    return [
        (signer, halt)
        for _, signer, halt in decode_halts(data, place.network)
        if halt_holds(halt, signer, members, place.network, epoch)
    ]

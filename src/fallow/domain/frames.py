"""The messages that travel on links, between gateways, nodes and stores.

Rules
- A frame is one of these headers and a payload of raw tensor bytes (little-endian, row-major); the codec is
  `fabric/codec.py`. Fields may be added; unknown fields are ignored, unknown kinds are refused by name.
- A session runs through a chain of stages. Its gateway drives it: it opens every stage, feeds the first, and is fed
  by the last. Stages hand rows to each other directly and decide nothing.
- A chain may *run ahead* (`Ahead`): its last stage tells the first one which token the gateway is going to choose, so
  that no row waits for the gateway's word. That word comes all the same, and it alone counts.
- *Positions* are token indices from 0. A stage's position is the number of tokens in its KV cache. Rows below it are
  duplicates and dropped; rows above it are a gap and answered with a `Fault`.
- *Epochs* fence: the gateway raises a session's epoch whenever it changes the chain or rewinds. A stage drops rows of
  an older epoch, and holds rows of a newer one until it has heard of that epoch from the gateway.

What opens, repairs and rewinds a session is always the same three steps: `OpenStage` to every stage of the chain,
`StageState` back from each, then `Flow` to all. `policy/recovery.py` works out what each must resend or recompute.
"""

from enum import StrEnum
from typing import ClassVar, Final

import msgspec

from fallow.domain.ids import Digest, NodeId, SessionId
from fallow.domain.model import Span
from fallow.domain.sampling import Recipe

PROTOCOL_VERSION = 1
"""The newest version spoken here. `Hello` carries the range that a peer speaks."""
PROTOCOL_VERSION_MIN = 1

MAX_HEADER_BYTES = 64 * 1024
MAX_FRAME_BYTES = 32 * 1024 * 1024
MAX_ROWS_PER_FRAME = 256


class Phase(StrEnum):
    """How a row is computed. CPU kernels round a lone row and a row among others differently, and 8-bit activations
    amplify that; so a row that is computed again (a rebuilt cache) is computed the way it was the first time."""

    PREFILL = "prefill"
    """Together with its neighbours: prompt tokens."""
    DECODE = "decode"
    """Alone in its sequence: generated tokens."""


class PeerAddress(msgspec.Struct, frozen=True, gc=False):
    """Where to dial a peer. Its id is its public key, so an address that lies cannot impersonate."""

    node: NodeId
    endpoints: tuple[str, ...]
    """`ip:port` for direct dialling; the in-memory fabric ignores them."""


class Header(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind"):
    """Base of every frame header."""

    has_payload: ClassVar[bool] = False


# --- the link itself ----------------------------------------------------------------------------


class Hello(Header, frozen=True, kw_only=True, tag="hello"):
    """First frame in each direction."""

    version_min: int
    version_max: int
    capabilities: tuple[str, ...] = ()
    role: str = "node"
    passport: str = ""
    """The sender's, by which the receiver admits it (`domain/credentials.py`)."""


class Credentials(Header, frozen=True, kw_only=True, tag="credentials"):
    """The sender's new passport, before the one that it showed last runs out."""

    passport: str


class Ping(Header, frozen=True, kw_only=True, tag="ping"):
    """Ask for a sign of life."""

    nonce: int


class Pong(Header, frozen=True, kw_only=True, tag="pong"):
    """The answer to a `Ping`, with its nonce."""

    nonce: int


class Goodbye(Header, frozen=True, kw_only=True, tag="goodbye"):
    """The peer is leaving on purpose: treat the link as closed now, and its sessions as in need of repair."""

    code: str
    message: str


# --- sessions: gateway to stages ----------------------------------------------------------------


class OpenStage(Header, frozen=True, kw_only=True, tag="open_stage"):
    """Hold a session on this stage at this epoch. Answered by `StageState` or `Refused`.

    A stage that does not hold it, or holds it for another span, reserves room and starts at position 0. One that does
    keeps its cache, grows the reservation if need be, takes no more rows of older epochs, and answers once what is
    being computed has finished.
    """

    session: SessionId
    epoch: int
    model: Digest
    span: Span
    reserve_tokens: int
    """KV room that the session may come to need, prompt and completion together."""
    grant: bytes = b""
    """The coordinator's leave for it: an encoded `Signed` grant (`domain/grants.py`)."""


class RenewGrant(Header, frozen=True, kw_only=True, tag="renew_grant"):
    """A new grant for a session that goes on, before the last one expires. Fire and forget; refused by a `Fault`."""

    session: SessionId
    grant: bytes


class StageState(Header, frozen=True, kw_only=True, tag="stage_state"):
    """A stage's answer to `OpenStage`: at rest, and waiting for `Flow`."""

    session: SessionId
    epoch: int
    position: int
    log_start: int
    """First position whose output rows this stage still keeps; equals `position` when it keeps none."""
    flowed_epoch: int
    """Epoch of the last `Flow` that it carried out, 0 for none: rewinds of later epochs have not reached it."""
    confirmed: int | None = None
    """Of a first stage that ran ahead: so many rows at most rest on tokens that the gateway sent."""


class Refused(Header, frozen=True, kw_only=True, tag="refused"):
    """A stage's other answer. `code` is that of a `FallowError`."""

    session: SessionId
    epoch: int
    code: str
    message: str


AHEAD_ROWS: Final = 16
"""So many rows may a chain be ahead of its gateway: what a round trip of 300 ms takes at 50 tokens/s. It is also what
is computed for nothing at most, when an answer ends where only the gateway can tell."""


class Ahead(msgspec.Struct, frozen=True, kw_only=True):
    """A last stage's leave to say which token comes next, before the gateway does."""

    first: PeerAddress
    first_session: SessionId
    """The stage that is told, as a `Rows` of one token, and the session's name there."""
    recipe: Recipe
    """How the gateway chooses."""
    drawn_from: int
    """Position of the answer's first token, whose draw is the first."""
    until: int
    """Only tokens at positions below this."""
    ends: tuple[int, ...]
    """Tokens after which the answer is over."""


class Flow(Header, frozen=True, kw_only=True, tag="flow"):
    """Let rows flow at this epoch. Fire and forget; of a newer epoch than the stage's, it fences as well.

    The stage first rewinds to `rewind_to` (when given), then sends its logged output rows from `forward_from` on to
    `next`, and from then on every row that it computes at or above `forward_from`.
    """

    session: SessionId
    epoch: int
    previous: NodeId | None
    """The stage that rows come from; `None` for the first, which the gateway feeds."""
    next: PeerAddress | None
    """The following stage; `None` for the last stage, which answers the gateway that sent this."""
    next_session: SessionId | None = None
    """The session's name there (`domain.ids.at_visit`); `None` when it is the same."""
    forward_from: int
    results_from: int
    """Where the gateway's results end: resent rows below need no logits again."""
    rewind_to: int | None = None
    ahead: Ahead | None = None
    """For the last stage."""
    ahead_from: NodeId | None = None
    """For the first stage: who else may feed it, one token at a time, `AHEAD_ROWS` beyond the gateway's at most."""


class CloseSession(Header, frozen=True, kw_only=True, tag="close_session"):
    """Free everything the session holds. Unknown sessions are fine."""

    session: SessionId


# --- sessions: rows along the chain -------------------------------------------------------------


class Rows(Header, frozen=True, kw_only=True, tag="rows"):
    """Input rows for a stage, at positions `position` to `position + count`.

    Payload: int32 token ids `[count]` for a stage that starts at layer 0, else hidden states `[count, hidden]` in the
    model's wire type (float16; float32 for f32 models).
    """

    has_payload: ClassVar[bool] = True

    session: SessionId
    epoch: int
    position: int
    count: int
    phase: Phase
    logits_from: int
    """Positions at or above this one get logits at the head."""
    top_k: int | None
    """That many log-probabilities a row, highest first; `None` for the full vocabulary."""


class Result(Header, frozen=True, kw_only=True, tag="result"):
    """The last stage's answer to the gateway: progress up to `position + count`, with logits where they were asked.

    Payload, for the `logit_count` rows that end at `position + count`: int32 ids `[logit_count, k]` then float32
    log-probabilities `[logit_count, k]`; with `k = None`, float32 log-probabilities `[logit_count, vocab]` alone.
    """

    has_payload: ClassVar[bool] = True

    session: SessionId
    epoch: int
    position: int
    count: int
    logit_count: int
    k: int | None
    chosen: int | None = None
    """The token that the first stage was told comes next."""


MISLED: Final = "misled"
"""The code of a first stage that was told another token than the gateway chose."""
LEAVING: Final = "leaving"
"""The code of a device that takes no new sessions and asks for its own to be moved."""


class Fault(Header, frozen=True, kw_only=True, tag="fault"):
    """A stage tells the session's gateway that it cannot go on. The gateway repairs the chain."""

    session: SessionId
    epoch: int
    code: str
    message: str
    suspect: NodeId | None = None
    """The device believed to be at fault, when it is not the sender."""
    void_from: int | None = None
    """With `MISLED`: the position of the first token that differs. Rows from there on are void."""


# --- model files --------------------------------------------------------------------------------


class FetchChunk(Header, frozen=True, kw_only=True, tag="fetch_chunk"):
    """Ask a peer for one chunk (`BLOB_CHUNK_BYTES`, the last may be shorter) of a blob."""

    digest: Digest
    index: int


class Chunk(Header, frozen=True, kw_only=True, tag="chunk"):
    """Payload: the chunk's bytes; empty when `found` is false."""

    has_payload: ClassVar[bool] = True

    digest: Digest
    index: int
    found: bool


AnyHeader = (
    Hello | Credentials | Ping | Pong | Goodbye
    | OpenStage | RenewGrant | StageState | Refused | Flow | CloseSession
    | Rows | Result | Fault
    | FetchChunk | Chunk
)  # fmt: skip


class Frame(msgspec.Struct, frozen=True):
    """One message on a link."""

    header: AnyHeader
    payload: bytes | bytearray | memoryview = b""

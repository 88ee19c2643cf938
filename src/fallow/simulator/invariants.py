"""What must hold at every step of a simulation: plain functions that return `None`, or say what is wrong.

Each has a test that plants the bug which it is there to catch (`tests/simulation/test_invariants.py`).
Bounds are the product's own where it has one; a bound in time is what the product's timers add up to, and a little.
"""

from collections.abc import Collection, Sequence
from typing import Final

from fallow.domain.frames import AHEAD_ROWS, Rows
from fallow.domain.ids import NodeId, SessionId, same_conversation
from fallow.fabric.memory_bus import PENDING_MESSAGES_MAX
from fallow.gateway.chain import REPAIR_TIMEOUT_S
from fallow.gateway.progress import STALL_TIMEOUT_S
from fallow.node.stage_session import ALL_BYTES_MAX, HELD_BYTES_MAX, HELD_ROWS_MAX, ORPHAN_GRACE_S
from fallow.simulator.gateways import Outcome, Turn
from fallow.simulator.view import CoordinatorView, NodeView

OUTLIVES_MAX_S: Final = ORPHAN_GRACE_S + 10.0
"""A device that lost its gateway keeps its sessions for the grace, notices the loss in 2 s and looks every second."""
NO_PROGRESS_MAX_S: Final = STALL_TIMEOUT_S + 3 * REPAIR_TIMEOUT_S
"""A chain is asked after a stall, then repaired or given up; what fails while it is repaired may double that."""

# --- devices ------------------------------------------------------------------------------------


def memory_is_within_the_owners_limit(node: NodeView) -> str | None:
    """Weights and KV cache together fit what the owner allows."""
    used = node.weights_bytes + node.kv_budget_bytes
    return f"{node.name} uses {used} bytes of {node.memory_bytes}" if used > node.memory_bytes else None


def kv_is_within_its_budget(node: NodeView) -> str | None:
    """What sessions have reserved fits the cache."""
    if node.kv_reserved_bytes <= node.kv_budget_bytes:
        return None
    return f"{node.name} has promised {node.kv_reserved_bytes} bytes of KV cache and has {node.kv_budget_bytes}"


def logs_are_within_their_budget(node: NodeView) -> str | None:
    """Activations kept for replay fit their budget, and the device knows how many they are."""
    if node.log_bytes != node.log_bytes_booked:
        return f"{node.name} keeps {node.log_bytes} bytes of rows and has {node.log_bytes_booked} in its books"
    if node.log_bytes > node.log_budget_bytes:
        return f"{node.name} keeps {node.log_bytes} bytes of rows for replay, {node.log_budget_bytes} are allowed"
    return None


def who_is_gone_computes_nothing(node: NodeView) -> str | None:
    """A device that left, was taken back or lost its power does no work."""
    if not node.gone or node.rows_computed == node.rows_when_gone:
        return None
    return f"{node.name} is gone and has computed {node.rows_computed - node.rows_when_gone} rows since"


def queues_are_bounded(node: NodeView) -> str | None:
    """Rows, engine calls and bus messages that wait stay within their bounds; a session has one call at a time."""
    if node.engine_waiting > node.engine_sessions:
        return (
            f"{node.name}: {node.engine_waiting} calls wait for its engine, with {node.engine_sessions} sessions open"
        )
    if node.bus_waiting > PENDING_MESSAGES_MAX // 64:
        return f"{node.name}: {node.bus_waiting} bus messages wait for it"
    if sum(stage.waiting_bytes for stage in node.stages) > ALL_BYTES_MAX:
        return f"{node.name}: more than {ALL_BYTES_MAX} bytes of rows wait"
    for stage in node.stages:
        if stage.waiting_rows > HELD_ROWS_MAX or stage.waiting_bytes > HELD_BYTES_MAX:
            return f"{node.name}: {stage.waiting_rows} rows of session {stage.session[:8]} wait"
    return None


def chains_run_ahead_within_bounds(node: NodeView) -> str | None:
    """No chain computes more beyond its gateway's word than it may: without that word it stops."""
    for stage in node.stages:
        if stage.rows_ahead > AHEAD_ROWS:
            return f"{node.name}: session {stage.session[:8]} is {stage.rows_ahead} rows ahead of its gateway"
    return None


NODE_INVARIANTS: Final = (
    memory_is_within_the_owners_limit,
    kv_is_within_its_budget,
    logs_are_within_their_budget,
    who_is_gone_computes_nothing,
    queues_are_bounded,
    chains_run_ahead_within_bounds,
)

# --- coordinators -------------------------------------------------------------------------------


def one_leads(coordinators: Sequence[CoordinatorView]) -> str | None:
    """At most one coordinator of a cell acts as its leader."""
    leading = [each for each in coordinators if each.epoch is not None]
    if len(leading) <= 1:
        return None
    return "these lead at once: " + ", ".join(f"{each.name} (epoch {each.epoch})" for each in leading)


def placement_fits(name: str, weights_bytes: int, memory_bytes: int, kv_budget_bytes: int) -> str | None:
    """What a coordinator orders a device to hold fits its memory."""
    if weights_bytes + kv_budget_bytes <= memory_bytes:
        return None
    return f"{name} is to hold {weights_bytes} bytes beside {kv_budget_bytes} of KV cache, and has {memory_bytes}"


# --- sessions -----------------------------------------------------------------------------------


def answers_are_unaltered(turn: Turn) -> str | None:
    """No token is lost, invented, doubled or changed, whatever happened to the chain."""
    if turn.outcome is Outcome.ALTERED:
        return f"session {turn.number} was answered with other tokens than one device would give"
    if turn.outcome is Outcome.FINISHED and turn.tokens != turn.wanted_tokens:
        return f"session {turn.number} got {turn.tokens} tokens of {turn.wanted_tokens}"
    return None


def sessions_make_progress(turn: Turn, now_s: float) -> str | None:
    """Every session that runs gets a token, its end or a named error within a bound."""
    since_s = max(turn.asked_s, turn.accepted_s or 0.0, turn.last_token_s or 0.0)
    if now_s - since_s <= NO_PROGRESS_MAX_S:
        return None
    return f"session {turn.number} has waited for {now_s - since_s:.0f} s ({turn.tokens} tokens so far)"


def nothing_outlives_its_session(name: str, session: SessionId, unknown_s: float) -> str | None:
    """A device frees what its gateway has closed, soon; `unknown_s`: for how long no gateway has known the session."""
    if unknown_s <= OUTLIVES_MAX_S:
        return None
    return f"{name} still holds session {session[:8]}, which ended {unknown_s:.0f} s ago"


class Paths:
    """The way that each session's rows take, for `one_chain_serves`. Bounded by the sessions that run."""

    def __init__(self) -> None:
        self.epochs: dict[SessionId, int] = {}
        self.feeds: dict[SessionId, dict[NodeId, NodeId]] = {}
        """For each session, who feeds whom in its newest epoch."""
        self.fed: dict[SessionId, dict[NodeId, NodeId]] = {}

    def keep(self, sessions: Collection[SessionId]) -> None:
        """Forget all others: an answer that moved to another chain left its first session."""
        for session in [session for session in self.epochs if session not in sessions]:
            self.forget(session)

    def stages_of(self, node: NodeId, session: SessionId, epoch: int) -> int:
        """How many stages of a session's chain a device was seen to be: one for each name that it got rows under."""
        names = [name for name, known in self.epochs.items() if known == epoch and same_conversation(name, session)]
        return sum(node in self.fed[name] for name in names)

    def forget(self, session: SessionId) -> None:
        for book in (self.epochs, self.feeds, self.fed):
            book.pop(session, None)


def one_chain_serves(paths: Paths, sender: NodeId, receiver: NodeId, session: SessionId, epoch: int) -> str | None:
    """No session is served twice at once: in one epoch its rows take one way, from each stage to one other."""
    known = paths.epochs.get(session, -1)
    if epoch < known:
        return None
    if epoch > known:
        paths.epochs[session], paths.feeds[session], paths.fed[session] = epoch, {}, {}
    to = paths.feeds[session].setdefault(sender, receiver)
    by = paths.fed[session].setdefault(receiver, sender)
    if (to, by) == (receiver, sender):
        return None
    if by == sender and paths.stages_of(sender, session, epoch) > 1:
        return None  # a device that is in the chain twice feeds two others
    return (
        f"session {session[:8]}, epoch {epoch}: {sender[:8]} feeds {receiver[:8]}, "
        f"but before it fed {to[:8]}, and {receiver[:8]} was fed by {by[:8]}"
    )


def positions_rise(ends: dict[tuple[SessionId, int, NodeId], int], receiver: NodeId, rows: Rows) -> str | None:
    """No position is sent twice to one stage in one epoch, and none is left out."""
    key = (rows.session, rows.epoch, receiver)
    before = ends.get(key)
    ends[key] = rows.position + rows.count
    if before is None or before == rows.position:
        return None
    return (
        f"session {rows.session[:8]}, epoch {rows.epoch}: rows at {rows.position} came to {receiver[:8]} after {before}"
    )

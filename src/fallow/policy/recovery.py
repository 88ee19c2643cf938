"""How a broken or rewound chain is put back together: activations are the log.

Every stage keeps the rows that it sent on. When a stage is replaced, the newcomer's KV cache is empty, and its
predecessor's log holds exactly the rows that rebuild it; the rest of the chain keeps what it has. The plan below is
worked out from the end of the chain to its start: each stage must be fed from where its own cache ends, so each
must be able to deliver from where its successor's cache ends. What it logged it resends; what it no longer has it
computes again, by rewinding to that point. The gateway, at the start, always can: it has the tokens.

The plan neither waits nor sends. It holds for any number of lost stages, neighbours included.
"""

from collections.abc import Sequence

import msgspec


class StagePosition(msgspec.Struct, frozen=True):
    """Where a stage stands, as its `StageState` says."""

    position: int
    log_start: int


class StagePlan(msgspec.Struct, frozen=True):
    """What its `Flow` must say."""

    forward_from: int
    rewind_to: int | None


class ChainPlan(msgspec.Struct, frozen=True):
    """The whole chain's plan; `feed_from` is where the gateway's tokens start."""

    stages: tuple[StagePlan, ...]
    feed_from: int


def plan_recovery(valid: int, received: int, stages: Sequence[StagePosition]) -> ChainPlan:
    """Plan the flows of a chain whose first `valid` tokens still hold and whose results arrived up to `received`.

    `valid` is below the stages' positions when the conversation was rewound (a follow-up turn that shares a prefix);
    `received <= valid`.
    """
    if not 0 <= received <= valid:
        raise ValueError(f"results up to {received} of {valid} valid tokens")
    plans: list[StagePlan] = []
    needed_from = received
    for stage in reversed(stages):
        position = min(stage.position, valid)
        if needed_from < position and needed_from < stage.log_start:
            position = needed_from
        rewind_to = position if position < stage.position else None
        plans.append(StagePlan(forward_from=needed_from, rewind_to=rewind_to))
        needed_from = position
    return ChainPlan(stages=tuple(reversed(plans)), feed_from=needed_from)

"""How a broken or rewound chain is put back together: activations are the log.

Every stage keeps the rows that it sent on. When a stage is replaced, the newcomer's KV cache is empty, and its
predecessor's log holds exactly the rows that rebuild it; the rest of the chain keeps what it has. The plan below is
worked out from the end of the chain to its start: each stage must be fed from where its own cache ends, so each
must be able to deliver from where its successor's cache ends. What it logged it resends; what it no longer has it
computes again, by rewinding to that point. The gateway, at the start, always can: it has the tokens.

The plan neither waits nor sends. It holds for any number of lost stages, neighbours included.

Besides: whether a chain that is repaired is worth more than another one that is being built (`supersedes`), and which
stage holds the others up (`first_behind`).
"""

from collections.abc import Sequence

import msgspec

REWINDS_MAX = 256
"""Rewinds of a conversation that are remembered one by one."""


class StagePosition(msgspec.Struct, frozen=True):
    """Where a stage stands, as its `StageState` says."""

    position: int
    log_start: int
    valid: int
    """How many of the conversation's leading tokens it can have computed as they are now."""


class StagePlan(msgspec.Struct, frozen=True):
    """What its `Flow` must say."""

    forward_from: int
    rewind_to: int | None


class Rewind(msgspec.Struct, frozen=True):
    """The conversation was cut back to `position` tokens in this epoch."""

    epoch: int
    position: int


def with_rewind(rewinds: tuple[Rewind, ...], latest: Rewind, rewinds_max: int = REWINDS_MAX) -> tuple[Rewind, ...]:
    """Add a rewind. Of two, the later one alone counts when it cuts as deep, so positions rise strictly.

    Beyond `rewinds_max` the newest takes its predecessor's place and position: that may cost a recomputation, and
    never trusts a row that it should not.
    """
    shallower = tuple(rewind for rewind in rewinds if rewind.position < latest.position)
    if len(shallower) < rewinds_max:
        return (*shallower, latest)
    return (*shallower[:-1], Rewind(latest.epoch, shallower[-1].position))


def valid_tokens(fed: int, flowed_epoch: int, rewinds: Sequence[Rewind]) -> int:
    """How many leading tokens a stage that carried out the `Flow` of `flowed_epoch` last can hold as they are now.

    `fed` is how many the gateway has fed in all. Every rewind that the stage has not seen bounds what it holds.
    """
    return min([fed, *(rewind.position for rewind in rewinds if rewind.epoch > flowed_epoch)])


class ChainPlan(msgspec.Struct, frozen=True):
    """The whole chain's plan; `feed_from` is where the gateway's tokens start."""

    stages: tuple[StagePlan, ...]
    feed_from: int


def plan_recovery(received: int, stages: Sequence[StagePosition]) -> ChainPlan:
    """Plan the flows of a chain whose results arrived up to `received`.

    A stage's `valid` is below its position when the conversation was rewound without it: a follow-up turn that shares
    a prefix, or a device that was away meanwhile.
    """
    plans: list[StagePlan] = []
    needed_from = received
    for stage in reversed(stages):
        position = min(stage.position, stage.valid)
        if needed_from < position and needed_from < stage.log_start:
            position = needed_from
        rewind_to = position if position < stage.position else None
        plans.append(StagePlan(forward_from=needed_from, rewind_to=rewind_to))
        needed_from = position
    return ChainPlan(stages=tuple(reversed(plans)), feed_from=needed_from)


def supersedes(rows_missing: int, rows: int, layers_lost: int, layers: int) -> bool:
    """Whether a second chain that has `rows_missing` of a conversation's `rows` to compute, through all `layers`, is
    ready no later than one that must compute all rows through `layers_lost` of them."""
    return rows_missing * layers <= rows * layers_lost


def first_behind(fed: int, positions: Sequence[int]) -> int:
    """The stage that holds a chain up: the first one that stands below the one before it, or the last one, when none
    does. Before the first one is the gateway, which fed `fed` rows. At least one position."""
    before = [fed, *positions]
    behind = (index for index, position in enumerate(positions) if position < before[index])
    return next(behind, len(positions) - 1)

"""What a chain's stages are called, and what each is told when it is opened and when rows are to flow. Values only.

A device that comes twice in a chain holds two stages of the session, which must not be taken for each other: each has
its own name there (`Hop.visit`, `domain.ids.at_visit`), in its grant and in every frame.
"""

from collections.abc import Sequence, Set

from fallow.domain.fleet import Hop
from fallow.domain.frames import Ahead, Flow, OpenStage, StageState
from fallow.domain.ids import Digest, NodeId, SessionId, at_visit
from fallow.policy.recovery import ChainPlan, Rewind, StagePosition, valid_tokens


def stage_of(session: SessionId, hop: Hop) -> tuple[NodeId, SessionId]:
    """A hop's device, and the session's name there."""
    return hop.address.node, at_visit(session, hop.visit)


def left_behind(session: SessionId, before: Sequence[Hop], after: Sequence[Hop]) -> list[tuple[NodeId, SessionId]]:
    """Stages that are not part of a chain any more, or are for other layers now."""
    stay = {(*stage_of(session, hop), hop.span) for hop in after}
    return [stage_of(session, hop) for hop in before if (*stage_of(session, hop), hop.span) not in stay]


def describe(hops: Sequence[Hop]) -> str:
    """For people."""
    return " > ".join(f"{hop.address.node[:8]}{hop.span}" for hop in hops)


def layers_on(nodes: Set[NodeId], hops: Sequence[Hop]) -> tuple[int, int]:
    """Layers of a chain that these devices hold, and all."""
    held = sum(hop.span.layer_count for hop in hops if hop.address.node in nodes)
    return held, sum(hop.span.layer_count for hop in hops)


def positions(states: Sequence[StageState], fed: int, rewinds: Sequence[Rewind]) -> list[StagePosition]:
    """Where stages stand by their word; `fed` and `rewinds` as `valid_tokens` has them."""
    return [StagePosition(s.position, s.log_start, valid_tokens(fed, s.flowed_epoch, rewinds)) for s in states]


def layers_anew(hops: Sequence[Hop], stages: Sequence[StagePosition], received: int) -> int:
    """How many layers have rows to compute whose results were here before."""
    behind = (min(stage.position, stage.valid) < received for stage in stages)
    return sum(hop.span.layer_count for hop, is_behind in zip(hops, behind, strict=True) if is_behind)


def openings(
    session: SessionId, epoch: int, hops: Sequence[Hop], model: Digest, reserve_tokens: int
) -> tuple[OpenStage, ...]:
    """For each hop, in order, what it is to hold, and its leave to."""
    return tuple(
        OpenStage(
            session=at_visit(session, hop.visit),
            epoch=epoch,
            model=model,
            span=hop.span,
            grant=hop.grant,
            reserve_tokens=reserve_tokens,
        )
        for hop in hops
    )


def flows(
    session: SessionId, epoch: int, hops: Sequence[Hop], plan: ChainPlan, results_from: int, ahead: Ahead | None
) -> tuple[Flow, ...]:
    """For each hop, in order, from whom its rows come, where they go, and from which position on. `ahead`: the last
    one's leave to run ahead."""
    last = len(hops) - 1
    names = [at_visit(session, hop.visit) for hop in hops]
    following = [*zip((hop.address for hop in hops[1:]), names[1:], strict=True), (None, None)]
    previous = [None, *(hop.address.node for hop in hops[:-1])]
    return tuple(
        Flow(
            session=names[index],
            epoch=epoch,
            previous=previous[index],
            next=following[index][0],
            next_session=following[index][1],
            forward_from=stage.forward_from,
            results_from=results_from,
            rewind_to=stage.rewind_to,
            ahead=ahead if index == last else None,
            ahead_from=hops[last].address.node if ahead is not None and index == 0 else None,
        )
        for index, stage in enumerate(plan.stages)
    )

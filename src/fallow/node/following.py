"""The step that follows: a device that is a whole chain asks its engine for the next token's row before it has heard of
the token, so that no row waits for the way between the engine's process and its agent.

Rules
- Only of a chain that runs ahead and has one stage, and one step at most. The engine draws the row's token itself, from
  the step before and by the same recipe (`engine/drawing.py`), and computes nothing after a token that ends the answer.
- Its row is counted against the grant when it is asked for. A grant that does not allow it is no reason to end the
  session: the row itself comes, and is refused.
- It counts when the row that comes next is just that token. Otherwise it is forgotten, and the engine rewound.
- Which token the engine drew is the engine's own word: the agent drew as well, and two processes may come to two. Then
  the row is computed anew with the agent's, and the session's engine is asked for nothing early any more. That costs a
  row, and never changes an answer.

Values and one task; when to ask and when to forget is the pump's.
"""

import asyncio

import msgspec

from fallow.domain.errors import EngineLost, FallowError
from fallow.domain.frames import AHEAD_ROWS, Flow, Phase
from fallow.domain.ids import NodeId, SessionId
from fallow.engine.contract import Drawn, StageEngine, Step, Stepped


class Following:
    """One such step."""

    __slots__ = ("step", "task", "token")

    def __init__(self, step: Step, task: "asyncio.Task[Stepped]") -> None:
        self.step = step
        self.task = task
        self.token: bytes | None = None
        """What the agent draws for it, once the step before is done; `None` until then, and when nothing follows."""
        task.add_done_callback(_look)

    def answers(self, step: Step) -> bool:
        """Whether it is just what this step asks for."""
        if self.token is None or step.count != 1 or bytes(step.payload) != self.token:
            return False
        return msgspec.structs.replace(step, payload=b"", drawn=self.step.drawn) == self.step

    async def stepped(self) -> Stepped | None:
        """What the engine computed for the token that the agent drew; `None` when it drew another, or none, or failed.
        Raises `EngineLost`."""
        assert self.token is not None
        try:
            stepped = await self.task
        except EngineLost:
            raise
        except FallowError:
            return None
        return stepped if stepped.drawn == int.from_bytes(self.token, "little") else None

    async def undone(self, engine: StageEngine, name: SessionId, position: int) -> None:
        """Have the engine stand at `position`, as if this had not been asked for. Raises `EngineLost`."""
        try:
            await self.task
        except EngineLost:
            raise
        except FallowError:
            return
        await engine.rewind(name, position)


def step_after(flow: Flow, own: NodeId, session: SessionId, step: Step, beyond: int) -> Step | None:
    """What a session's engine may be asked for behind `step`; `beyond`: how far that row is beyond the gateway's."""
    ahead, position = flow.ahead, step.position + step.count
    if ahead is None or flow.previous is not None or (ahead.first.node, ahead.first_session) != (own, session):
        return None
    known = step.top_k is not None and step.logits_from < position
    if not (known and ahead.drawn_from <= position < ahead.until and beyond < AHEAD_ROWS):
        return None
    drawn = Drawn(recipe=ahead.recipe, nth=position - ahead.drawn_from, ends=ahead.ends)
    return Step(
        session=step.session, position=position, count=1, phase=Phase.DECODE, logits_from=position, top_k=step.top_k,
        payload=b"", drawn=drawn,
    )  # fmt: skip


def _look(task: "asyncio.Task[Stepped]") -> None:
    """Whoever forgets it need not look."""
    if not task.cancelled():
        task.exception()

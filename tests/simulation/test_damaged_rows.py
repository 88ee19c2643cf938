"""A device whose rows are damaged is left, and the answer is the one that nobody disturbed.

Method: real sessions, links and relays on virtual time; one device's engine starts to set a high bit in what it sends
on, and the receiving devices hold rows against a rule, as they do with a model's own (`node/row_checks.py`).
"""

import asyncio
from struct import unpack

import msgspec
import pytest

from fallow.domain.ids import Digest
from fallow.engine.contract import Step, Stepped
from fallow.engine.memory import MemoryEngine
from fallow.node.activation_log import Buffer
from fallow.node.row_checks import RowChecks
from tests.simulation.sessions import Fleet, Node
from tests.simulation.test_failover import COUNT, PROMPT, THREE_AND_SPARES, generate, run_virtual, undisturbed

IMPOSSIBLE = 1 << 40
"""The toy's rows are numbers below 2^30."""


class ToyChecks(RowChecks):
    def complaint(self, model: Digest, layer: int, payload: Buffer, count: int) -> str | None:
        if layer == 0:
            return None
        found = max(unpack(f"<{count}q", payload)) >= IMPOSSIBLE
        self.refused += found
        return "a row is like none that the model makes here" if found else None


def damage(engine: MemoryEngine) -> None:
    """From now on, a bit of every hidden row that leaves is set."""
    compute = engine._compute

    def damaged(held: object, step: Step) -> Stepped:
        stepped = compute(held, step)  # type: ignore[arg-type]
        if stepped.logit_count or not stepped.payload:
            return stepped
        rows = bytearray(stepped.payload)
        rows[5::8] = bytes(byte | 1 for byte in rows[5::8])
        return msgspec.structs.replace(stepped, payload=bytes(rows))

    engine._compute = damaged  # type: ignore[method-assign, assignment]


def checked(node: Node) -> ToyChecks:
    checks = ToyChecks()
    node.relay._pump._checks = checks
    return checks


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("after_tokens", [0, 7])
def test_rows_that_cannot_be_are_refused_and_their_sender_is_left(position: int, after_tokens: int) -> None:
    async def program() -> tuple[list[int], int, int, list[str], bool]:
        fleet = Fleet()
        await fleet.start(*THREE_AND_SPARES)
        checks = [checked(node) for node in fleet.nodes]
        chain = fleet.chain()
        if after_tokens == 0:
            damage(fleet.nodes[position].engine)
        task = asyncio.create_task(generate(chain, PROMPT, COUNT))
        while after_tokens and len(chain.tokens) < len(PROMPT) + after_tokens:
            await asyncio.sleep(0.001)
        damage(fleet.nodes[position].engine)
        tokens = await task
        left = fleet.nodes[position].id not in chain.nodes()
        return tokens, chain.repairs, sum(check.refused for check in checks), fleet.events, left

    tokens, repairs, refused, events, left = run_virtual(program())
    assert tokens == undisturbed(), "an answer, not garbage"
    assert (repairs, left) == (1, True)
    assert refused >= 1
    assert any("numeric_fault" in event for event in events), events

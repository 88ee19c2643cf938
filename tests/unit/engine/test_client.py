"""What the agent's side hands to the socket of its worker: everything in order, and nothing empty."""

import asyncio

from engine_world import SMALL, name_of, step_of

from fallow.domain.errors import UnknownSession
from fallow.engine.client import JOIN_BYTES, WorkerEngine


class Handed:
    """The real transport, and what it was handed."""

    def __init__(self, transport):
        self._transport = transport
        self.pieces = []

    def write(self, piece):
        self.pieces.append(bytes(piece))
        self._transport.write(piece)

    def writelines(self, pieces):
        copies = [bytes(piece) for piece in pieces]
        self.pieces += copies
        self._transport.writelines(copies)

    def __getattr__(self, name):
        return getattr(self._transport, name)


def test_no_empty_piece_reaches_the_transport_and_every_request_is_answered():
    """From Python 3.12 on, a transport never gets rid of an empty piece: the loop spins, and `close` does not end."""

    async def scenario():
        engine = WorkerEngine(SMALL, [])
        await engine.start()
        try:
            handed = engine._worker._transport = Handed(engine._worker._transport)
            large = step_of(name_of(1), 0, range(JOIN_BYTES // 4 + 1))
            small = step_of(name_of(1), 0, [1])
            async with asyncio.timeout(10):
                answers = await asyncio.gather(
                    engine.free(name_of(1)), engine.step(small), engine.step(large), engine.step(small),
                    engine.free(name_of(2)), return_exceptions=True,
                )  # fmt: skip
        finally:
            await engine.close()
        assert [type(answer) for answer in answers] == [type(None), *[UnknownSession] * 3, type(None)]
        assert all(handed.pieces)
        assert large.payload in handed.pieces, "large rows are not copied into anything"

    asyncio.run(scenario())

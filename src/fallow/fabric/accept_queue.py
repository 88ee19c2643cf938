"""Inbound links on their way from a transport to whoever iterates `accept()`. Bounded: more than that are refused."""

import asyncio
from collections import deque
from typing import Final

from fallow.fabric.contract import PushLink

ACCEPT_QUEUE_MAX: Final = 128
"""Inbound links that nobody has taken yet."""


class AcceptQueue:
    """An async iterator of links, fed by a transport. One consumer."""

    def __init__(self) -> None:
        self._links: deque[PushLink] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._closed = False

    def offer(self, link: PushLink) -> bool:
        """Hand a link over; false when the queue is full or closed, and the caller must refuse the link."""
        if self._closed or len(self._links) >= ACCEPT_QUEUE_MAX:
            return False
        self._links.append(link)
        self._wake()
        return True

    def close(self) -> None:
        """End the iteration after the links that already wait. Idempotent."""
        self._closed = True
        self._wake()

    def __aiter__(self) -> "AcceptQueue":
        return self

    async def __anext__(self) -> PushLink:
        while not self._links:
            if self._closed:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._links.popleft()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

"""Fetching: verified, from several sources, in spite of bad ones, resumed."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from fallow.domain.errors import BlobUnavailable
from fallow.domain.ids import Digest
from fallow.domain.model import BLOB_CHUNK_BYTES, BlobRef
from fallow.fabric.memory import MemoryFabric
from fallow.node.fetch import CHUNK_TIMEOUT_S
from fallow.simulator.virtual_time import run_virtual
from tests.unit.node.support import LyingSource, Receiver, SilentSource, Source

CONTENT = bytes(range(256)) * (BLOB_CHUNK_BYTES // 256) * 9 + b"the end"

Script = Callable[[Receiver, list[Source], BlobRef], Awaitable[None]]


def run(folder: Path, kinds: list[type[Source]], script: Script) -> None:
    """Sources of these kinds, all with the blob but plain ones whose kind is given as `Empty`."""

    async def program() -> None:
        fabric = MemoryFabric(0.001)
        receiver = Receiver(fabric, folder)
        sources = [kind(fabric, index + 1, folder) for index, kind in enumerate(kinds)]
        ref = None
        for source in sources:
            await source.peers.start()
            if not isinstance(source, Empty):
                ref = source.store.add_bytes(CONTENT)
        await receiver.peers.start()
        assert ref is not None
        await script(receiver, sources, ref)

    run_virtual(program())


class Empty(Source):
    """Has nothing."""


def addresses(sources: list[Source]) -> list:  # type: ignore[type-arg]
    return [source.address for source in sources]


def fetched(receiver: Receiver, ref: BlobRef) -> bytes | None:
    path = receiver.store.blob_path(ref.digest)
    return None if path is None else path.read_bytes()


def test_sources_share_the_work_and_progress_is_told(tmp_path: Path) -> None:
    async def script(receiver: Receiver, sources: list[Source], ref: BlobRef) -> None:
        told: list[float] = []
        await receiver.fetcher.fetch_all([ref], addresses(sources), told.append)
        assert fetched(receiver, ref) == CONTENT
        assert all(source.asked for source in sources)
        assert sum(len(source.asked) for source in sources) == len(ref.chunk_digests)
        assert told == sorted(told)
        assert told[-1] == 1.0

    run(tmp_path, [Source, Source], script)


@pytest.mark.parametrize("bad", [Empty, LyingSource, SilentSource])
def test_a_bad_source_is_dropped_and_the_others_deliver(tmp_path: Path, bad: type[Source]) -> None:
    async def script(receiver: Receiver, sources: list[Source], ref: BlobRef) -> None:
        await receiver.fetcher.fetch_all([ref], addresses(sources), lambda _: None)
        assert fetched(receiver, ref) == CONTENT
        assert len(sources[0].asked) <= 4, "one window and no more"

    run(tmp_path, [bad, Source], script)


def test_a_source_that_dies_is_replaced_at_once(tmp_path: Path) -> None:
    async def program() -> float:
        fabric = MemoryFabric(0.001)
        receiver = Receiver(fabric, tmp_path)
        silent, good = SilentSource(fabric, 1, tmp_path), Source(fabric, 2, tmp_path)
        for source in (silent, good):
            await source.peers.start()
        ref = good.store.add_bytes(CONTENT)
        await receiver.peers.start()
        fetch = asyncio.create_task(receiver.fetcher.fetch_all([ref], addresses([silent, good]), lambda _: None))
        while not silent.asked:
            await asyncio.sleep(0.001)
        fabric.crash(silent.id)
        started_s = asyncio.get_running_loop().time()
        await fetch
        assert fetched(receiver, ref) == CONTENT
        return asyncio.get_running_loop().time() - started_s

    assert run_virtual(program()) < 1.0


def test_when_nobody_delivers_every_reason_is_told(tmp_path: Path) -> None:
    async def script(receiver: Receiver, sources: list[Source], ref: BlobRef) -> None:
        with pytest.raises(BlobUnavailable) as caught:
            await receiver.fetcher.fetch_all([ref], addresses(sources), lambda _: None)
        for words in ("not got it", "expected SHA-256", f"within {CHUNK_TIMEOUT_S:g} s"):
            assert words in caught.value.message
        with pytest.raises(BlobUnavailable, match="no peer is known"):
            await receiver.fetcher.fetch_all([ref], [], lambda _: None)

    run(tmp_path, [Empty, LyingSource, SilentSource], script)


def test_what_has_arrived_is_not_fetched_again(tmp_path: Path) -> None:
    async def script(receiver: Receiver, sources: list[Source], ref: BlobRef) -> None:
        partial = receiver.store.partial(ref)
        for index in range(5):
            partial.write_chunk(index, CONTENT[index * BLOB_CHUNK_BYTES : (index + 1) * BLOB_CHUNK_BYTES])
        await receiver.fetcher.fetch_all([ref], addresses(sources), lambda _: None)
        assert fetched(receiver, ref) == CONTENT
        assert sorted(index for _, index in sources[0].asked) == list(range(5, len(ref.chunk_digests)))
        await receiver.fetcher.fetch_all([ref], [], lambda _: None)

    run(tmp_path, [Source], script)


def test_two_fetches_of_one_blob_cost_one(tmp_path: Path) -> None:
    async def script(receiver: Receiver, sources: list[Source], ref: BlobRef) -> None:
        both = [receiver.fetcher.fetch_all([ref], addresses(sources), lambda _: None) for _ in range(2)]
        await asyncio.gather(*both)
        assert len(sources[0].asked) == len(ref.chunk_digests)

    run(tmp_path, [Source], script)


def test_a_manifest_that_is_not_what_was_asked_for_is_refused(tmp_path: Path) -> None:
    async def script(receiver: Receiver, sources: list[Source], ref: BlobRef) -> None:
        with pytest.raises(BlobUnavailable, match="another digest"):
            await receiver.fetcher.manifest(ref.digest, ref.size_bytes, addresses(sources))
        with pytest.raises(BlobUnavailable, match="not one that Fallow fetches"):
            await receiver.fetcher.manifest(Digest("ab" * 32), 1 << 40, addresses(sources))

    run(tmp_path, [LyingSource], script)

"""Models are loaded once, loaded anew when they change, and forgotten when there are too many."""

import asyncio
from datetime import datetime

import msgspec
import pytest

from fallow.domain.errors import BlobUnavailable, UnknownModel
from fallow.domain.model import Manifest
from fallow.gateway.text import MAX_INLINE_CHARS, MAX_LOADED_MODELS, TextModels
from tests.unit.gateway.gateway_world import CHATML, manifest, run, tokenizer, tokenizer_json


class Shelf:
    """Models that can be had, and how often their tokenizer was read."""

    def __init__(self, *manifests: Manifest) -> None:
        self.manifests = list(manifests)
        self.reads: list[str] = []
        self.broken = False
        self.models = TextModels(lambda: self.manifests, self.read, datetime.now)

    async def read(self, wanted: Manifest) -> bytes:
        self.reads.append(wanted.name)
        await asyncio.sleep(0)
        if self.broken:
            raise BlobUnavailable("no peer has it")
        return tokenizer_json()


def test_one_load_serves_all_who_wait_and_one_of_them_may_leave() -> None:
    async def scenario() -> None:
        shelf = Shelf(manifest("a"))
        waiting = [asyncio.create_task(shelf.models.get("a")) for _ in range(5)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        loaded = await asyncio.gather(*waiting, return_exceptions=True)
        assert isinstance(loaded[0], asyncio.CancelledError)
        assert len({id(each) for each in loaded[1:]}) == 1
        assert shelf.reads == ["a"]
        await shelf.models.get("a")
        assert shelf.reads == ["a"]

    run(scenario())


def test_an_equal_manifest_is_the_same_model_and_a_changed_one_is_not() -> None:
    async def scenario() -> None:
        shelf = Shelf(manifest("a"))
        first = await shelf.models.get("a")
        shelf.manifests = [manifest("a")]
        assert await shelf.models.get("a") is first
        shelf.manifests = [msgspec.structs.replace(manifest("a"), chat_template=CHATML + " ")]
        changed = await shelf.models.get("a")
        assert changed is not first
        assert changed.digest != first.digest

    run(scenario())


def test_a_failed_load_can_be_tried_again() -> None:
    async def scenario() -> None:
        shelf = Shelf(manifest("a"))
        shelf.broken = True
        with pytest.raises(BlobUnavailable):
            await shelf.models.get("a")
        shelf.broken = False
        await shelf.models.get("a")

    run(scenario())


def test_models_that_are_gone_or_were_never_there() -> None:
    async def scenario() -> None:
        shelf = Shelf(manifest("a"))
        await shelf.models.get("a")
        shelf.manifests = []
        with pytest.raises(UnknownModel):
            await shelf.models.get("a")

    run(scenario())


def test_the_least_used_model_is_forgotten() -> None:
    async def scenario() -> None:
        names = [f"m{i}" for i in range(MAX_LOADED_MODELS + 1)]
        shelf = Shelf(*map(manifest, names))
        for name in names:
            await shelf.models.get(name)
        await shelf.models.get(names[-1])
        assert len(shelf.reads) == len(names)
        await shelf.models.get(names[0])
        assert shelf.reads[-1] == names[0]

    run(scenario())


def test_long_texts_are_tokenised_like_short_ones() -> None:
    async def scenario() -> list[int]:
        model = await Shelf(manifest("a")).models.get("a")
        return await model.encode_chat("fleet " * MAX_INLINE_CHARS)

    assert run(scenario()) == tokenizer().encode("fleet " * MAX_INLINE_CHARS).ids

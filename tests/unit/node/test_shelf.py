"""What a device tells of its disk."""

import asyncio
from pathlib import Path

from fallow.domain.model import Span
from fallow.models.store import Store
from fallow.node.shelf import ShelfReader
from tests.simulation.control import toy_model


def test_the_layers_that_are_there_are_told_after_a_restart_too(tmp_path: Path) -> None:
    operator, device = Store(tmp_path / "operator"), Store(tmp_path / "device")
    entry = toy_model(operator)
    manifest = operator.manifest(entry.model)
    reader = ShelfReader(device)
    assert asyncio.run(reader.read()).cached == {}
    for index in (0, 1, 3):
        path = operator.blob_path(manifest.layers[index].digest)
        assert path is not None
        device.add_file(path)
    assert asyncio.run(reader.read({entry.model})).cached == {}, "without a manifest, files are only files"
    device.add_bytes(operator.manifest_bytes(entry.model))
    for found in (asyncio.run(reader.read({entry.model})), asyncio.run(ShelfReader(device).read())):
        assert found.cached == {entry.model: (Span(0, 2), Span(3, 4))}
        assert found.disk_free_bytes is not None
        assert found.disk_free_bytes > 0


def test_a_file_that_only_begins_like_a_manifest_is_passed_over(tmp_path: Path) -> None:
    device = Store(tmp_path)
    device.add_bytes(b'{"bos_token_id":null, and no more')
    assert device.manifests() == []

"""Fixtures of the system tests: a store with the default model, imported once for all of them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from fallow.domain.errors import ModelError
from fallow.models.default import ensure_default_model
from fallow.models.store import Store
from fallow.processes.local_service import LocalService
from tests.system.harness import SPLIT, OneDevice, service


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the default model; without a network and a cached download, the test is skipped."""
    root = tmp_path_factory.mktemp("store")
    try:
        ensure_default_model(Store(root))
    except ModelError as error:
        pytest.skip(f"the default model cannot be had: {error.message}")
    return root


@pytest.fixture(scope="session")
def one_device(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Iterator[OneDevice]:
    """For test_hostile_clients.py, and then test_hostile_models.py, which ends it."""
    lent = OneDevice(lambda: tmp_path_factory.mktemp("one-device"), store)
    yield lent
    lent.end()


@pytest.fixture(scope="module")
def split_service(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Iterator[LocalService]:
    """Three devices, no API keys, every piece of the model on two of them."""
    with service(tmp_path_factory.mktemp("split"), store, *SPLIT) as running:
        running.wait_until_servable(copies=2)
        yield running

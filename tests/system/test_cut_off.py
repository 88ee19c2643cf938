"""A device of a running chain loses its network: no broken connection tells of it, only silence. The answer goes on.

Every device is in a network namespace of its own, and joins by an invitation alone. Between them are encrypted links
over UDP and nothing else: where a link cannot be made, no chain is. A device is cut off by taking its port off the
bridge. It comes back when the port does, and serves again.
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from fallow.gateway.keys import new_key
from fallow.processes.local_service import LocalService, holders
from tests.system.harness import Answer, ask, service
from tests.system.networks import HUB_ADDRESS, Laboratory, needs_namespaces

pytestmark = needs_namespaces()

DEVICES = 3
"""A chain of two, and one that takes the place of either."""
READY_LIMIT_S = 120.0
CHAIN_LIMIT_S = 20.0
STALL_LIMIT_S = 15.0
SILENCE_MIN_S = 1.0
"""Silence is not noticed sooner; a shorter pause would mean that something told of the loss."""
UDP_ONLY = '[links]\nlocal_sockets = false\nrelay = "never"\n'
TELL = "Tell a long story about a lighthouse keeper and the sea."
PLACES = {"first": 0, "last": -1}
KEYS = {name: new_key() for name in ("calm", *PLACES)}


@pytest.fixture(scope="module")
def laboratory() -> Iterator[Laboratory]:
    with Laboratory(DEVICES) as built:
        yield built


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, store: Path, laboratory: Laboratory) -> Iterator[LocalService]:
    """`fallow up` in the hub, a device in each namespace, no Unix sockets and no relay between them."""
    keys = "\n".join(f'[[gateway.keys]]\nid = "{name}"\nsha256 = "{digest}"' for name, (_, digest) in KEYS.items())
    settings = f'[placement]\nmax_share = 0.7\n\n{UDP_ONLY}\n[bus]\nhost = "{HUB_ADDRESS}"\n\n{keys}'
    made = service(tmp_path_factory.mktemp("cut-off"), store, "--nodes", "0", settings=settings)
    running = laboratory.inside(None, made.__enter__)
    device_file = running.folder / "device.toml"
    device_file.write_text(UDP_ONLY)
    lent = ("--config", str(device_file), "--memory", "1GiB", "--threads", "1")
    try:
        for index in range(DEVICES):
            laboratory.inside(index, partial(running.join, f"device-{index}", *lent))
        yield running
    finally:
        laboratory.inside(None, lambda: made.__exit__(None, None, None))


def _wait_until_whole(fleet: LocalService) -> None:
    fleet.wait_for(
        lambda status: len(status.nodes) == DEVICES and holders(status) >= 2,
        READY_LIMIT_S,
        f"{DEVICES} devices and two copies",
    )


def _chain(fleet: LocalService) -> list[int]:
    """Indices of the devices of the one running answer."""
    deadline_s = time.monotonic() + CHAIN_LIMIT_S
    while time.monotonic() < deadline_s:
        status = fleet.status()
        names = {beat.node: beat.name for beat in status.nodes}
        for chain in (chain for gateway in status.gateways for chain in gateway.chains):
            if chain and all(node in names for node in chain):
                return [int(names[node].removeprefix("device-")) for node in chain]
        time.sleep(0.05)
    raise AssertionError("the gateway reported no running chain")


@pytest.fixture(scope="module")
def calm(fleet: LocalService, laboratory: Laboratory) -> Answer:
    """The undisturbed answer."""

    def work() -> Answer:
        _wait_until_whole(fleet)
        return ask(fleet.api_url, TELL, 60, KEYS["calm"][0])

    answer = laboratory.inside(None, work)
    assert answer.error is None
    assert len(answer.pieces) > 5, "there is something to compare"
    return answer


@pytest.mark.parametrize("place", PLACES)
def test_the_answer_survives_a_device_that_is_cut_off(
    fleet: LocalService, laboratory: Laboratory, calm: Answer, place: str
) -> None:
    cut: list[int] = []

    def cut_once(answer: Answer) -> None:
        if not cut and len(answer.pieces) == 10:
            with ThreadPoolExecutor(1) as pool:  # `_chain` runs a loop of its own
                chain = pool.submit(_chain, fleet).result()
            assert len(chain) >= 2
            cut.append(chain[PLACES[place]])
            laboratory.cut(cut[0])

    def work() -> Answer:
        _wait_until_whole(fleet)
        return ask(fleet.api_url, TELL, 60, KEYS[place][0], cut_once)

    try:
        answer = laboratory.inside(None, work)
    finally:
        for device in cut:
            laboratory.heal(device)
    assert cut
    assert answer.error is None
    assert answer.text == calm.text
    assert SILENCE_MIN_S < answer.longest_gap_s < STALL_LIMIT_S
    laboratory.inside(None, lambda: _wait_until_whole(fleet))

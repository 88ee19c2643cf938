"""Any stage of a real chain dies or hangs, at any time, and the answer goes on, the same to the token.

Six device processes, none of which may hold more than 0.4 of the model, every piece on two of them: chains have three
stages or more, and each stage has a spare. Each case asks with a fresh API key, since kept caches belong to keys and a
fresh run must prefill. Processes are really killed (kill -9) or stopped (SIGSTOP), agent and worker together, found by
the chain that the gateway reports.
"""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from fallow.gateway.keys import new_key
from fallow.processes.local_service import LocalService, holders
from tests.system.harness import Answer, ask, service

THREE_STAGES_TWICE = ("--nodes", "6", "--max-share", "0.4", "--memory", "700MiB")
READY_LIMIT_S = 120.0
CHAIN_LIMIT_S = 20.0
STALL_LIMIT_S = {signal.SIGKILL: 10.0, signal.SIGSTOP: 12.0}
"""Bounds on a busy machine; what is really needed is measured by benchmarks/failover.py."""
TELL = "Tell a long story about a lighthouse keeper and the sea."
LONG = " ".join(f"Fact {number}: the ship number {number} carried {number * 7 % 97} barrels." for number in range(80))
QUESTIONS = {"decode": (TELL, 60), "prefill": (f"{LONG} Now tell a story about these ships.", 16)}
KEYS = {
    name: new_key()
    for name in ["calm-decode", "calm-prefill", "case-leave", "case-standby", *(f"case-{index}" for index in range(12))]
}
CASES = [
    pytest.param(place, signal_number, phase, id=f"{place}-{signal_number.name}-{phase}")
    for place in ("first", "middle", "last")
    for signal_number in (signal.SIGKILL, signal.SIGSTOP)
    for phase in ("prefill", "decode")
]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, store: os.PathLike[str]) -> Iterator[LocalService]:
    settings = "\n".join(f'[[gateway.keys]]\nid = "{name}"\nsha256 = "{digest}"' for name, (_, digest) in KEYS.items())
    folder = tmp_path_factory.mktemp("failover")
    with service(folder, store, *THREE_STAGES_TWICE, settings=settings) as running:  # type: ignore[arg-type]
        yield running


@pytest.fixture(scope="module")
def calm(fleet: LocalService) -> dict[str, Answer]:
    """The undisturbed answers."""
    _wait_until_whole(fleet)
    answers = {}
    for phase, (question, tokens) in QUESTIONS.items():
        answers[phase] = ask(fleet.api_url, question, tokens, KEYS[f"calm-{phase}"][0])
        assert answers[phase].error is None
        assert len(answers[phase].pieces) > 5, "there is something to compare"
    return answers


def _wait_until_whole(fleet: LocalService) -> None:
    """All six devices, and every layer ready on two of them."""
    fleet.wait_for(
        lambda status: len(status.nodes) == 6 and holders(status) >= 2, READY_LIMIT_S, "six devices and two copies"
    )


def _running_chain(fleet: LocalService) -> list[str]:
    """Names of the devices of the one running answer."""
    deadline_s = time.monotonic() + CHAIN_LIMIT_S
    while time.monotonic() < deadline_s:
        status = fleet.status()
        names = {beat.node: beat.name for beat in status.nodes}
        for gateway in status.gateways:
            for chain in gateway.chains:
                if chain and all(node in names for node in chain):
                    return [names[node] for node in chain]
        time.sleep(0.05)
    raise AssertionError("the gateway reported no running chain")


def _strike(fleet: LocalService, place: str, signal_number: signal.Signals) -> tuple[int, ...]:
    chain = _running_chain(fleet)
    assert len(chain) >= 3
    pids = fleet.device_pids(chain[{"first": 0, "middle": len(chain) // 2, "last": -1}[place]])
    for pid in pids:
        os.kill(pid, signal_number)
    return pids


@pytest.mark.parametrize(("place", "signal_number", "phase"), CASES)
def test_the_answer_survives(
    fleet: LocalService,
    calm: dict[str, Answer],
    request: pytest.FixtureRequest,
    place: str,
    signal_number: signal.Signals,
    phase: str,
) -> None:
    _wait_until_whole(fleet)
    index = [case.id for case in CASES].index(request.node.callspec.id)
    question, tokens = QUESTIONS[phase]
    struck: tuple[int, ...] = ()
    with ThreadPoolExecutor(1) as pool:
        began_s = time.monotonic()
        asking = pool.submit(ask, fleet.api_url, question, tokens, KEYS[f"case-{index}"][0])
        try:
            struck = _strike(fleet, place, signal_number)
            struck_s = time.monotonic() - began_s
            answer = asking.result(120)
        finally:
            if signal_number is signal.SIGSTOP:
                for pid in struck:
                    os.kill(pid, signal.SIGCONT)
    assert answer.error is None
    assert answer.text == calm[phase].text
    if phase == "decode":
        assert answer.longest_gap_s < STALL_LIMIT_S[signal_number]
    assert answer.at_s[-1] > struck_s, "the device was struck while the answer was under way"


def test_killing_the_coordinator_interrupts_no_answer(fleet: LocalService, calm: dict[str, Answer]) -> None:
    _wait_until_whole(fleet)
    killed: list[int] = []

    def kill_once(answer: Answer) -> None:
        if not killed and len(answer.pieces) == 10:
            killed.append(fleet.child_pid("coordinator"))
            os.kill(killed[0], signal.SIGKILL)

    answer = ask(fleet.api_url, TELL, 60, KEYS["calm-decode"][0], kill_once)
    assert killed
    assert answer.text == calm["decode"].text
    _wait_until_whole(fleet)
    assert fleet.child_pid("coordinator") != killed[0]


def test_a_device_that_leaves_politely_takes_no_answer_with_it(fleet: LocalService, calm: dict[str, Answer]) -> None:
    """SIGTERM to an agent in the chain: it drains, and has the gateway move its session before it goes."""
    _wait_until_whole(fleet)
    told: list[int] = []

    def leave_once(answer: Answer) -> None:
        if not told and len(answer.pieces) == 25:
            told.append(fleet.device_pids(_running_chain(fleet)[0])[0])
            os.kill(told[0], signal.SIGTERM)

    answer = ask(fleet.api_url, TELL, 60, KEYS["case-leave"][0], leave_once)
    assert told
    assert answer.error is None
    assert answer.text == calm["decode"].text
    assert answer.longest_gap_s < STALL_LIMIT_S[signal.SIGKILL]


def test_the_chain_that_stands_by_takes_over(fleet: LocalService, calm: dict[str, Answer]) -> None:
    """For a request of the tier `priority`; the devices of the first chain are killed, one of them."""
    _wait_until_whole(fleet)

    def standing_by(name: str) -> float:
        lines = httpx.get(f"{fleet.api_url}/metrics", trust_env=False).text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(f"fallow_standby_{name} "))

    killed: list[int] = []

    def kill_once(answer: Answer) -> None:
        if not killed and len(answer.pieces) >= 15 and standing_by("chains"):
            killed.extend(_strike(fleet, "middle", signal.SIGKILL))

    before = standing_by("takeovers_total")
    answer = ask(fleet.api_url, TELL, 60, KEYS["case-standby"][0], kill_once, service_tier="priority")
    assert killed
    assert answer.error is None
    assert answer.text == calm["decode"].text
    assert answer.longest_gap_s < STALL_LIMIT_S[signal.SIGKILL]
    assert standing_by("takeovers_total") == before + 1
    assert standing_by("chains") == 0

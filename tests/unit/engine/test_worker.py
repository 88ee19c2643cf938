"""The worker's loop: who was answered hears it at once, checks come after that, and who has nothing to do sleeps."""

import socket
import threading
import time
from contextlib import contextmanager

import msgspec
from engine_world import SMALL, Driver, family, name_of, step_of

from fallow.domain.frames import Phase
from fallow.domain.model import Quantisation, Span
from fallow.engine import protocol
from fallow.engine.guard import Guard
from fallow.engine.worker import CALM_S, RECEIVE_BYTES, _Worker

HALF = Span(0, 2)


@contextmanager
def worker_and_agent(settings=SMALL):
    """A worker that hosts half a model, with two sessions that have decoded together, and its agent's end."""
    agent, own = socket.socketpair()
    with agent, own:
        model = family("llama", Quantisation.Q8)
        worker = _Worker(own, settings)
        core = worker._core
        stage = model.stage(HALF)
        core.load(stage, model.manifest, model.files(stage))
        driver = Driver(core)
        for number in range(4):
            core.open(name_of(number), model.digest, HALF, 50)
            driver.run(step_of(name_of(number), 0, [1, 2, 3]))
        driver.run(*[step_of(name_of(number), 3, [4], Phase.DECODE) for number in range(4)])
        yield worker, agent


def send(agent, request, payload=b""):
    agent.sendall(b"".join(protocol.encode(request, payload)))


def replies(agent):
    return [reply for reply, _ in protocol.Frames(protocol.REPLIES).feed(agent.recv(RECEIVE_BYTES))]


def decode(ticket, number, position):
    step = step_of(name_of(number), position, [4], Phase.DECODE)
    return protocol.run_request(ticket, step), step.payload


def test_an_answer_does_not_wait_for_rows_that_others_wait_for():
    with worker_and_agent() as (worker, agent):
        agent.setblocking(False)
        send(agent, *decode(1, 0, 4))
        send(agent, protocol.Reserve(2, name_of(1), 50))
        assert worker._receive()
        assert [reply.ticket for reply in replies(agent)] == [2], "before the call, and before the row's partner came"
        assert worker._core.has_work


def test_checks_run_once_what_was_computed_is_sent():
    with worker_and_agent() as (worker, agent):
        unsent = []

        class Watched(Guard):
            def work(self, *, busy):
                unsent.append(bool(worker._outbox))
                return super().work(busy=busy)

        worker._core.guard = Watched(worker._core.settings)
        serving = threading.Thread(target=worker.serve)
        serving.start()
        agent.settimeout(10.0)
        assert isinstance(replies(agent)[0], protocol.Ready)
        send(agent, *decode(1, 0, 4))
        assert [type(reply) for reply in replies(agent)] == [protocol.Computed]
        agent.shutdown(socket.SHUT_WR)
        serving.join(10.0)
        assert not serving.is_alive()
        assert unsent and not any(unsent)


def test_a_worker_whose_check_waits_for_calm_sleeps_until_then():
    settings = msgspec.structs.replace(SMALL, canary_interval_s=60.0, rehash_share=0.0)
    with worker_and_agent(settings) as (worker, _):
        now_s = time.monotonic()
        worker._core.guard._canary_at_s = now_s - 1.0
        assert worker._rest_s() == 0.0
        worker._computed_at_s = now_s
        assert CALM_S / 2 < worker._rest_s() <= CALM_S, "it is not asked again and again meanwhile"

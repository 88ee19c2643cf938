"""Sessions, their steps, and what is computed next: the engine without its process. Synchronous; does no I/O but files.

Rules
- Steps and rewinds of a session happen in the order given. `turn` computes one call: the next row of every session
  that has a decode step, or one chunk of one prefill; `policy/batching.py` says which.
- A step is checked when its turn comes: a wrong one is refused and leaves its session as it was.
- A prefill step is cut into chunks. A decode step of several rows is a cache that is rebuilt: it takes turns with the
  prefills, in calls that give each row the bits that it had when it was computed alone (`replay.py`).
- Freeing a session ends its steps with `UnknownSession`.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fallow.domain.errors import EngineError, FallowError, KvExhausted, NumericFault, PositionMismatch, UnknownSession
from fallow.domain.frames import MAX_FRAME_BYTES, MAX_ROWS_PER_FRAME, Phase
from fallow.domain.ids import Digest, SessionId
from fallow.domain.model import Manifest, Span, StageSpec
from fallow.engine.contract import PREFILL_CHUNK_ROWS, Loaded, Step, Stepped
from fallow.engine.guard import Guard
from fallow.engine.hosted import DecodeRow, HostedModel
from fallow.engine.kv import KvBudget, trim_heap
from fallow.engine.piece import HEAD_ROWS_MAX
from fallow.engine.replay_check import replay_works
from fallow.engine.runs import Rewind, Run, Session
from fallow.engine.settings import EngineSettings
from fallow.policy.batching import GATHER_S, Turn, chunk_rows, decode_limit, next_turn, patience_s
from fallow.policy.fair_turns import FairTurns

Array = NDArray[Any]
REPLAY_CHUNK_ROWS = 64
"""Rows of a rebuilt cache in one turn; mapping and unmapping it costs 5 % at that size."""
Outcome = tuple[int, Stepped | FallowError | None]
"""A ticket and what became of it; `None` for a rewind that was done."""


class EngineCore:
    """Hosted models and their sessions. `turn` is called until there is nothing to do."""

    def __init__(self, settings: EngineSettings, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds that never go back."""
        self.settings = settings
        self._clock = clock
        self.budget = KvBudget(settings.kv_budget_bytes)
        self._models: dict[Digest, HostedModel] = {}
        self._sessions: dict[SessionId, Session] = {}
        self._decoding: dict[SessionId, Session] = {}
        self._prefilling: deque[Session] = deque()
        self._turns = FairTurns()
        self._previous = Turn.WAIT
        self._decoded_rows = 0
        self._decode_calls = 0
        self._replays = replay_works()
        self._outcomes: list[Outcome] = []
        self.guard = Guard(settings)
        """Its checks are its owner's to run, between turns."""

    @property
    def session_count(self) -> int:
        return len(self._sessions)

    # --- models ---------------------------------------------------------------------------------

    def load(self, stage: StageSpec, manifest: Manifest, files: Mapping[Digest, Path]) -> Loaded:
        """See `StageEngine.load`."""
        started_s = time.perf_counter()
        hosted = self._models.get(stage.model) or HostedModel(manifest, self.settings, replays=self._replays)
        prepared = hosted.prepare(stage, files)
        answers = self.guard.examine(hosted, prepared, files)
        hosted.commit(prepared)
        self.guard.adopt(stage.model, hosted, answers)
        self._models[stage.model] = hosted
        trim_heap()
        for session in list(self._sessions.values()):
            if session.hosted is hosted and not hosted.pieces_of(session.span):
                self.free(session.id)
        layers = Span(0, stage.layer_count)
        return Loaded(
            weights_bytes=hosted.weights_bytes,
            kv_bytes_per_token=hosted.kv_bytes_per_token(layers),
            load_s=time.perf_counter() - started_s,
            speed=hosted.speed,
        )

    def unload(self, model: Digest) -> None:
        for session in list(self._sessions.values()):
            if session.model == model:
                self.free(session.id)
        hosted = self._models.pop(model, None)
        if hosted is not None:
            hosted.end_replay()
        self.guard.forget(model)

    # --- sessions -------------------------------------------------------------------------------

    def open(self, name: SessionId, model: Digest, span: Span, reserve_tokens: int) -> None:
        """Raises `KvExhausted`, or `EngineError` for a span that is not hosted or a session that is already here."""
        hosted = self._models.get(model)
        if hosted is None or not hosted.pieces_of(span):
            there = "nothing" if hosted is None else ", ".join(map(str, hosted.stage_pieces))
            raise EngineError(f"span {span} is not hosted: of this model there is {there}")
        if name in self._sessions:
            raise EngineError(f"session {name} is already open")
        session = Session(name, model, hosted, span, hosted.take_slot())
        try:
            self._grow(session, reserve_tokens)
        except EngineError:
            hosted.give_slot(session.slot)
            raise
        self._sessions[name] = session

    def reserve(self, name: SessionId, reserve_tokens: int) -> None:
        """Raises `UnknownSession`, `KvExhausted`."""
        self._grow(self._session(name), reserve_tokens)

    def rewind(self, ticket: int, name: SessionId, position: int) -> None:
        """Queue a rewind behind the session's steps. Raises `UnknownSession`."""
        session = self._session(name)
        session.queue.append(Rewind(ticket, position))
        if len(session.queue) == 1:
            self._advance(session)

    def free(self, name: SessionId) -> None:
        session = self._sessions.pop(name, None)
        if session is None:
            return
        self._decoding.pop(name, None)
        session.hosted.teams.forget(name)
        self._turns.forget(name)
        if session in self._prefilling:
            self._prefilling.remove(session)
        for waiting in session.queue:
            self._outcomes.append(
                (waiting.ticket, UnknownSession(f"session {name} was freed before its step was done"))
            )
        session.queue.clear()
        self.budget.release(session.reserved_tokens * session.hosted.kv_bytes_per_token(session.span))
        session.hosted.give_slot(session.slot)

    def step(self, ticket: int, step: Step) -> None:
        """Queue a step. Raises `UnknownSession`."""
        session = self._session(step.session)
        session.queue.append(Run(ticket, step))
        if len(session.queue) == 1:
            self._advance(session)

    def _session(self, name: SessionId) -> Session:
        session = self._sessions.get(name)
        if session is None:
            raise UnknownSession(f"session {name} is not open on this engine")
        return session

    def _grow(self, session: Session, reserve_tokens: int) -> None:
        hosted = session.hosted
        if reserve_tokens < 1:
            raise EngineError(f"a reservation is 1 token or more, not {reserve_tokens}")
        if reserve_tokens > hosted.max_tokens:
            raise KvExhausted(f"a session has at most {hosted.max_tokens} tokens on this device, not {reserve_tokens}")
        more = reserve_tokens - session.reserved_tokens
        if more > 0:
            self.budget.reserve(more * hosted.kv_bytes_per_token(session.span))
            session.reserved_tokens = reserve_tokens

    # --- queues ---------------------------------------------------------------------------------

    def _advance(self, session: Session) -> None:
        """Bring the head of a session's queue on its way: do rewinds, refuse bad steps, line up the first good one."""
        while session.queue:
            head = session.queue[0]
            try:
                if isinstance(head, Rewind):
                    self._do_rewind(session, head)
                else:
                    head.rows = self._check(session, head)
                    if head.step.phase is Phase.DECODE and (head.step.count == 1 or not session.hosted.replays):
                        self._decoding[session.id] = session
                    else:
                        self._prefilling.append(session)
                    return
            except FallowError as error:
                self._outcomes.append((head.ticket, error))
            session.queue.popleft()

    def _do_rewind(self, session: Session, rewind: Rewind) -> None:
        if not 0 <= rewind.position <= session.position:
            raise PositionMismatch(f"session {session.id} is at {session.position}, not past {rewind.position}")
        session.position, session.last = rewind.position, None
        self._outcomes.append((rewind.ticket, None))

    def _check(self, session: Session, run: Run) -> Array:
        """Refuse a step that does not fit its session, or give its input rows `[count, H]`."""
        step = run.step
        if not 0 < step.count <= MAX_ROWS_PER_FRAME:
            raise EngineError(f"a step has 1 to {MAX_ROWS_PER_FRAME} rows, not {step.count}")
        if step.position != session.position:
            raise PositionMismatch(f"session {session.id} is at {session.position}, not at {step.position}")
        if step.position + step.count > session.reserved_tokens:
            raise PositionMismatch(
                f"session {session.id} reserved {session.reserved_tokens} tokens; rows up to "
                f"{step.position + step.count} do not fit"
            )
        hosted = session.hosted
        if session.has_head:
            _check_result_size(step, hosted.config.vocab_size)
        dtype = np.dtype(np.int32) if session.takes_tokens else hosted.wire
        width = 1 if session.takes_tokens else hosted.config.hidden_size
        payload = session.payload_of(run)
        wanted, got = step.count * width * dtype.itemsize, memoryview(payload).nbytes
        if wanted != got:
            raise EngineError(f"{step.count} rows for {session.span} are {wanted} bytes, not {got}")
        rows = np.frombuffer(payload, dtype).reshape(step.count, width)
        if not session.takes_tokens:
            return rows
        assert hosted.embedding is not None
        ids = rows[:, 0]
        if int(ids.min()) < 0 or int(ids.max()) >= hosted.config.vocab_size:
            raise EngineError(f"token ids are 0 to {hosted.config.vocab_size - 1}, not {int(ids.min())} to {ids.max()}")
        return hosted.embedding.rows(ids)

    # --- computing ------------------------------------------------------------------------------

    def turn(self) -> Turn:
        """Compute one call, if there is anything to compute. What came of it is in `outcomes`."""
        turn = next_turn(self._previous, len(self._decoding), len(self._prefilling))
        self._previous = turn
        if not any(_current(session).step.phase is Phase.DECODE for session in self._prefilling):
            for hosted in self._models.values():
                hosted.end_replay()
        if turn is Turn.DECODE:
            self._decoded_rows = len(self._decoding)
            self._decode()
        elif turn is Turn.PREFILL:
            self._prefill()
            self._decoded_rows = 0
        return turn

    @property
    def has_work(self) -> bool:
        return bool(self._decoding or self._prefilling)

    def outcomes(self) -> list[Outcome]:
        """What was finished or refused since the last call."""
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def _decode(self) -> None:
        """The next row of the sessions that decode together, model by model."""
        self._decode_calls += 1
        for hosted in self._models.values():
            ready = [session for session in self._decoding.values() if session.hosted is hosted]
            if ready:
                self._decode_model(hosted, self._together(hosted, ready))

    def _together(self, hosted: HostedModel, ready: list[Session]) -> list[Session]:
        """Which of the sessions that are ready, all of one model, go into one call."""
        entering = [session for session in ready if session.takes_tokens]
        arrived = [session for session in ready if not session.takes_tokens]
        chosen = {session.id for session in arrived[: self._decode_limit(arrived)]}
        if entering:
            chosen.update(hosted.teams.choose(*self._waiting(entering)))
        return [session for session in ready if session.id in chosen]

    def _waiting(self, entering: list[Session]) -> tuple[list[SessionId], int, float, float]:
        """What `DecodeTeams` asks of sessions of one model whose tokens enter it here."""
        oldest = entering[0]
        patience = patience_s(oldest.hosted.speed.layer_s_1 * oldest.span.layer_count)
        groups = min(session.groups for session in entering)
        return [session.id for session in entering], groups, self._clock(), patience

    def _decode_limit(self, ready: list[Session]) -> int:
        """How many of the sessions that are ready behind the first stage, all of one model, go into one call."""
        if not ready:
            return 0
        groups = min(session.groups for session in ready)
        since = self._decode_calls - 2 * groups
        hosted = ready[0].hosted
        recent = sum(s.hosted is hosted and s.decode_call > max(since, 0) for s in self._sessions.values())
        return decode_limit(max(recent, len(ready)), groups)

    def gather_s(self) -> float:
        """How long to wait for rows that belong into the next decode call and are probably on their way; 0 for not at
        all. Ask again when some have come."""
        ready = list(self._decoding.values())
        if not ready or self._prefilling:
            return 0.0
        if not all(session.takes_tokens for session in ready):
            return GATHER_S if len(ready) < self._decode_limit(ready) else 0.0
        hosts = {id(session.hosted): session.hosted for session in ready}.values()
        entering = [(hosted.teams, [session for session in ready if session.hosted is hosted]) for hosted in hosts]
        return min(teams.wait_s(*self._waiting(sessions)) for teams, sessions in entering)

    def _decode_model(self, hosted: HostedModel, sessions: list[Session]) -> None:
        started_s = time.perf_counter()
        runs = [_current(session) for session in sessions]
        for session in sessions:
            session.decode_call = self._decode_calls
            self._decoding[session.id] = self._decoding.pop(session.id)  # whoever is not done goes to the end
        rows = [
            DecodeRow(session.slot, session.span, run.next_row()) for session, run in zip(sessions, runs, strict=True)
        ]
        leaving = hosted.decode(rows)
        wanted = [
            (run, row)
            for session, run, row in zip(sessions, runs, leaving, strict=True)
            if row is not None and session.has_head and session.position >= run.step.logits_from
        ]
        _add_logits(hosted, wanted)
        elapsed_s = time.perf_counter() - started_s
        for session, run, row in zip(sessions, runs, leaving, strict=True):
            self._account(session, run, elapsed_s, None if row is None else row[None])
        self._compact(hosted, [row.slot for row in rows])

    def _compact(self, hosted: HostedModel, slots: list[int]) -> None:
        """Bring sessions that decode together into neighbouring slots, where that pays."""
        swap = hosted.compact(slots)
        if swap is not None:
            moved = {swap.one: swap.other, swap.other: swap.one}
            for session in self._sessions.values():
                if session.hosted is hosted:
                    session.slot = moved.get(session.slot, session.slot)

    def _prefill(self) -> None:
        """One chunk of a prompt, or of a cache that is rebuilt."""
        session = self._sessions[self._turns.next(waiting.id for waiting in self._prefilling)]
        self._prefilling.remove(session)
        for hosted in self._models.values():
            hosted.teams.wait_again()
        run = _current(session)
        assert run.rows is not None
        started_s = time.perf_counter()
        rows_max = PREFILL_CHUNK_ROWS if run.step.phase is Phase.PREFILL else REPLAY_CHUNK_ROWS
        count = chunk_rows(run.step.count - run.done, self._decoded_rows, rows_max)
        compute = session.hosted.prefill if run.step.phase is Phase.PREFILL else session.hosted.replay
        leaving = compute(session.slot, session.span, run.rows[run.done : run.done + count])
        if leaving is not None and session.has_head:
            first = max(0, run.step.logits_from - session.position)
            _add_logits(session.hosted, [(run, row) for row in leaving[first:]])
        self._turns.took(session.id, count * session.span.layer_count)
        self._account(session, run, time.perf_counter() - started_s, leaving)
        if session.queue and session.queue[0] is run:
            self._prefilling.append(session)

    def _account(self, session: Session, run: Run, elapsed_s: float, leaving: Array | None) -> None:
        """Move a run on by the rows that were computed, and end it when it is done or at fault."""
        run.compute_s += elapsed_s
        if leaving is None or run.faulty:
            session.position = run.step.position
            self._end(session, run, NumericFault(f"rows of {session.span} from {run.step.position} are not finite"))
            return
        session.position += len(leaving)
        run.done += len(leaving)
        if not session.has_head:
            run.hidden.append(leaving.tobytes())
        if run.done == run.step.count:
            self._end(session, run, run.result(session.hosted.config.vocab_size, session.has_head))

    def _end(self, session: Session, run: Run, result: Stepped | FallowError) -> None:
        self._outcomes.append((run.ticket, result))
        session.last = result if isinstance(result, Stepped) else None
        self._decoding.pop(session.id, None)
        session.queue.popleft()
        self._advance(session)


def _current(session: Session) -> Run:
    run = session.queue[0]
    assert isinstance(run, Run)
    return run


def _add_logits(hosted: HostedModel, wanted: list[tuple[Run, Array]]) -> None:
    """Log-probabilities of these final rows `[H]`, added to their runs; not finite ones make their run faulty."""
    for start in range(0, len(wanted), HEAD_ROWS_MAX):
        part = wanted[start : start + HEAD_ROWS_MAX]
        assert hosted.head is not None
        logits = hosted.head.logits([row for _, row in part])
        for (run, _), row_logits in zip(part, logits, strict=True):
            try:
                run.add_logits(row_logits)
            except NumericFault:
                run.faulty = True


def _check_result_size(step: Step, vocab_size: int) -> None:
    """Refuse a step whose answer would not fit a frame, or that asks for less than one log-probability."""
    if step.top_k is not None and step.top_k < 1:
        raise EngineError(f"top_k is 1 or more, or none for the full vocabulary; not {step.top_k}")
    k = vocab_size if step.top_k is None else min(step.top_k, vocab_size)
    rows = step.position + step.count - max(step.position, step.logits_from)
    if rows * k * 8 > MAX_FRAME_BYTES:
        raise EngineError(f"log-probabilities for {rows} rows of {k} tokens do not fit a frame; ask for fewer")

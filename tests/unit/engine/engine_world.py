"""Models and drivers for the engine's tests: family fixtures imported once, and steps with less writing."""

import tempfile
import time
from functools import cache, lru_cache
from pathlib import Path

import numpy as np

from fallow.domain.frames import Phase
from fallow.domain.ids import ModelName
from fallow.domain.model import Quantisation, Span, StageSpec
from fallow.engine.contract import Step, Stepped
from fallow.engine.core import EngineCore
from fallow.engine.settings import EngineSettings
from fallow.models.importer import import_model
from fallow.models.manifest import layer_files
from fallow.models.store import Store

FIXTURES = Path(__file__).parents[2] / "fixtures" / "families"
FAMILIES = ("llama", "llama_rope", "mistral", "qwen2", "qwen3")
SMALL = EngineSettings(kv_budget_bytes=64 << 20, niceness=0, slots_max=16)


class Model:
    """An imported model: manifest, digest and files."""

    def __init__(self, store, manifest, digest):
        self.manifest, self.digest = manifest, digest
        self.layer_count = manifest.config.layer_count
        self.whole = Span(0, self.layer_count)
        self._store = store
        self.folder = Path(store.keep.name)

    def stage(self, *pieces):
        return StageSpec(model=self.digest, pieces=tuple(pieces) or (self.whole,))

    def files(self, stage):
        return {ref.digest: self._store.blob_path(ref.digest) for ref in layer_files(self.manifest, stage)}

    def hosted(self, *pieces, settings=SMALL, clock=time.monotonic):
        """An engine core that hosts these pieces; the whole model in one when none are named."""
        core = EngineCore(settings, clock)
        stage = self.stage(*pieces)
        core.load(stage, self.manifest, self.files(stage))
        return core


@lru_cache(maxsize=1)
def _store():
    folder = tempfile.TemporaryDirectory(prefix="fallow-engine-tests-")
    store = Store(Path(folder.name))
    store.keep = folder
    return store


@cache
def family(name, quantisation=Quantisation.F32):
    """A family fixture of `tests/fixtures/families`, imported once a test run."""
    report = import_model(
        FIXTURES / name, _store(), quantisation, ModelName(f"{name}-{quantisation}".replace("_", "-"))
    )
    return Model(_store(), report.manifest, report.digest)


@cache
def reference(name):
    return dict(np.load(FIXTURES / name / "reference.npz"))


def name_of(number):
    return f"{number:032x}"


def step_of(session, position, rows, phase=Phase.PREFILL, *, logits_from=0, top_k=None):
    """`rows`: token ids, or an array of hidden rows `[count, H]`."""
    payload = rows if isinstance(rows, np.ndarray) and rows.ndim == 2 else np.asarray(rows, np.int32)
    return Step(
        session=session, position=position, count=len(rows), phase=phase, logits_from=logits_from, top_k=top_k,
        payload=payload.tobytes(),
    )  # fmt: skip


class Driver:
    """Runs steps on a core, one at a time or several at once."""

    def __init__(self, core):
        self.core = core
        self.ticket = 0

    def submit(self, step):
        self.ticket += 1
        self.core.step(self.ticket, step)
        return self.ticket

    def settle(self):
        """Compute until there is nothing left; outcomes by ticket, in the order in which they came."""
        outcomes = dict(self.core.outcomes())
        while self.core.has_work:
            self.core.turn()
            outcomes.update(self.core.outcomes())
        return outcomes

    def run(self, *steps):
        """Submit steps, settle, and return their results in the order given; raises the first that failed."""
        tickets = [self.submit(step) for step in steps]
        outcomes = self.settle()
        results = [outcomes[ticket] for ticket in tickets]
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results

    def rewind(self, session, position):
        self.ticket += 1
        self.core.rewind(self.ticket, session, position)
        outcome = self.settle()[self.ticket]
        if outcome is not None:
            raise outcome


class Chain:
    """A model over several engines, one piece each, and one session through all of them."""

    def __init__(self, model, *pieces, session=None, reserve_tokens=64, drivers=None):
        self.model = model
        self.pieces = pieces or (model.whole,)
        self.session = session or name_of(1)
        self.drivers = drivers or [Driver(model.hosted(piece)) for piece in self.pieces]
        self.position = 0
        for driver, piece in zip(self.drivers, self.pieces, strict=True):
            driver.core.open(self.session, model.digest, piece, reserve_tokens)

    def push(self, tokens, phase=Phase.PREFILL, *, logits_from=0, top_k=None):
        """Rows through the whole chain; what the head says: a `Stepped`."""
        rows = np.asarray(tokens, np.int32)
        for driver in self.drivers:
            step = step_of(self.session, self.position, rows, phase, logits_from=logits_from, top_k=top_k)
            [stepped] = driver.run(step)
            rows = hidden_rows(self.model, stepped, len(tokens))
        self.position += len(tokens)
        return stepped

    def rewind(self, position):
        for driver in self.drivers:
            driver.rewind(self.session, position)
        self.position = position


def hidden_rows(model, stepped, count):
    wire = np.float32 if model.manifest.quantisation is Quantisation.F32 else np.float16
    if (
        stepped.logit_count
        or len(stepped.payload) != count * model.manifest.config.hidden_size * np.dtype(wire).itemsize
    ):
        return None
    return np.frombuffer(stepped.payload, wire).reshape(count, -1)


def log_probabilities(model, stepped: Stepped):
    """Full log-probabilities `[rows, V]`."""
    return np.frombuffer(stepped.payload, np.float32).reshape(stepped.logit_count, model.manifest.config.vocab_size)


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def relative_error(actual, expected):
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))

"""Known answers and hashes: sound engines pass, a changed bit is found and named, checks wait for their turn."""

import numpy as np
import pytest
from engine_world import SMALL, Driver, family, name_of, step_of

from fallow.domain.errors import EngineError
from fallow.domain.model import Quantisation, Span
from fallow.engine.canary import canary_rows, check_answer, reference_logits, reference_rows
from fallow.engine.core import EngineCore
from fallow.engine.guard import Guard
from fallow.engine.settings import EngineSettings
from fallow.models.reference import ReferenceModel, StoredWeights

KINDS = [
    ("llama", Quantisation.F32),
    ("qwen2", Quantisation.Q8),
    ("qwen3", Quantisation.Q8),
    ("mistral", Quantisation.Q4),
]


class Time:
    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


def hosted(model, *pieces, time=None, **settings):
    core = EngineCore(EngineSettings(**{**{f: getattr(SMALL, f) for f in SMALL.__struct_fields__}, **settings}))
    if time is not None:
        core.guard = Guard(core.settings, time)
    stage = model.stage(*pieces)
    core.load(stage, model.manifest, model.files(stage))
    return core


@pytest.mark.parametrize(("name", "quantisation"), KINDS)
def test_a_sound_engine_answers_like_the_reference_and_always_the_same(name, quantisation):
    model = family(name, quantisation)
    middle = model.layer_count // 2
    core = hosted(model, Span(0, middle), Span(middle, model.layer_count))
    assert core.guard.check_all() is None
    driver = Driver(core)
    core.open(name_of(1), model.digest, model.whole, 60)
    driver.run(step_of(name_of(1), 0, [5, 6, 7]))
    assert core.guard.check_all() is None, "sessions do not change answers"


def test_a_canary_does_not_change_what_sessions_compute():
    model = family("qwen2", Quantisation.Q8)
    answers = []
    for checks in (0, 3):
        core = hosted(model)
        driver = Driver(core)
        core.open(name_of(1), model.digest, model.whole, 60)
        payload = b""
        for position in range(12):
            [stepped] = driver.run(step_of(name_of(1), position, [position + 3]))
            payload += bytes(stepped.payload)
            for _ in range(checks):
                assert core.guard.check_all() is None
        answers.append(payload)
    assert answers[0] == answers[1]


@pytest.mark.parametrize(("name", "quantisation"), KINDS)
def test_the_reference_is_that_of_the_models(name, quantisation):
    model = family(name, quantisation)
    reference = ReferenceModel(StoredWeights(model.manifest, model._store))
    tokens = [3, 1, 4, 1, 5]
    rows = reference._embedding[tokens]
    ours = reference_rows(model.files(model.stage()), model.manifest, model.whole, rows)
    logits = reference_logits(model.files(model.stage()), model.manifest, ours)
    assert np.allclose(logits, reference.logits(tokens), rtol=2e-3, atol=2e-3)


def test_an_answer_that_is_not_the_references_is_refused():
    rows = canary_rows(family("llama").manifest.config)
    check_answer("it", rows * np.float32(1.1), rows)
    for wrong in (rows[:, ::-1], rows * np.float32(2), np.full_like(rows, np.nan), np.zeros_like(rows)):
        with pytest.raises(EngineError, match="does not compute"):
            check_answer("it", wrong, rows)


def test_a_stage_whose_weights_are_anothers_is_not_hosted(monkeypatch):
    model = family("llama")
    layers = model.manifest.layers
    monkeypatch.setattr("fallow.engine.guard.reference_rows", lambda f, m, span, rows: reference_rows(
        {**f, layers[span.first].digest: f[layers[span.first + 1].digest]}, m, span, rows))  # fmt: skip
    with pytest.raises(EngineError, match="not sound"):
        hosted(model)


def test_a_runtime_with_other_weights_than_at_load_is_found_and_named():
    """Single bits are flipped by tests/system/test_containment.py and benchmarks/bitflips.py."""
    model = family("qwen2", Quantisation.Q8)
    core, other = hosted(model), hosted(family("qwen2", Quantisation.Q4))
    [piece], [another] = (next(iter(c._models.values())).pieces for c in (core, other))
    assert core.guard.check_all() is None
    piece._session, piece._bindings = another._session, type(piece._bindings)()
    found = core.guard.check_all()
    assert found is not None and f"piece {piece.span}" in found and "canary" in found


def test_a_file_that_changes_under_the_mapping_is_found_and_named(tmp_path):
    model = family("llama")
    core = EngineCore(SMALL)
    stage = model.stage()
    files = {}
    for digest, path in model.files(stage).items():
        files[digest] = tmp_path / digest
        files[digest].write_bytes(path.read_bytes())
    core.load(stage, model.manifest, files)
    assert core.guard.check_all() is None
    victim = model.manifest.embedding.digest
    with files[victim].open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    found = core.guard.check_all()
    assert found is not None and victim[:12] in found


def test_checks_come_in_turns_wait_while_busy_and_rest_after_a_pass():
    time = Time()
    model = family("llama")
    middle = model.layer_count // 2
    core = hosted(
        model, Span(0, middle), Span(middle, model.layer_count), time=time, canary_interval_s=30.0, rehash_share=0.0
    )
    guard = core.guard
    assert guard.wait_s(busy=False) == pytest.approx(10.0), "two pieces and a head"
    for expected in (1, 2, 3):
        time.now_s += 10.0
        assert guard.work(busy=False) is None
        assert guard.canaries_done == expected
    time.now_s += 39.0
    assert guard.work(busy=True) is None and guard.canaries_done == 3, "an answer is under way"
    assert guard.wait_s(busy=False) == 0.0
    assert guard.wait_s(busy=True) == pytest.approx(1.0), "who sleeps until then does not ask again and again"
    time.now_s += 2.0
    assert guard.work(busy=True) is None and guard.canaries_done == 4, "but not for ever"

    hashing = hosted(model, time=time, canary_interval_s=0.0, rehash_share=0.5).guard
    steps = 0
    while (wait_s := hashing.wait_s(busy=True)) is not None and wait_s < SMALL.rehash_rest_s / 2:
        time.now_s += wait_s + 0.001
        assert hashing.work(busy=True) is None
        steps += 1
        assert steps < 1000
    assert hashing.chunks_done >= model.layer_count
    core.unload(model.digest)
    assert guard.wait_s(busy=False) is None

"""Graphs of every family against transformers: whole, chunked, ragged, rewound, and cut anywhere.

The reference logits are committed (`tests/fixtures/families`). Engines give log-probabilities, so that is what is
compared; the promise is 1e-4 relative at 32 bits.
"""

from itertools import pairwise

import msgspec
import numpy as np
import onnx
import pytest
from engine_world import (
    FAMILIES,
    Chain,
    Driver,
    family,
    log_probabilities,
    log_softmax,
    name_of,
    reference,
    relative_error,
    step_of,
)

from fallow.domain.errors import EngineError
from fallow.domain.frames import Phase
from fallow.domain.model import Quantisation, Span, cut_points
from fallow.engine.graph import piece_graph

TOLERANCE = 1e-4


def expected(name):
    return log_softmax(reference(name)["logits"])


def tokens(name):
    return reference(name)["tokens"].tolist()


def every_split(layer_count):
    """One stage, every pair of stages, and one stage a layer."""
    edges = [(0, cut, layer_count) for cut in range(1, layer_count)]
    for edge in [(0, layer_count), *edges, tuple(range(layer_count + 1))]:
        yield [Span(first, last) for first, last in pairwise(edge)]


@pytest.mark.parametrize("name", FAMILIES)
def test_prefill_agrees_with_transformers_over_any_split_bit_for_bit(name):
    model = family(name)
    payloads = set()
    for pieces in every_split(model.layer_count):
        stepped = Chain(model, *pieces).push(tokens(name))
        assert relative_error(log_probabilities(model, stepped), expected(name)) < TOLERANCE
        payloads.add(bytes(stepped.payload))
    assert len(payloads) == 1


@pytest.mark.parametrize("name", FAMILIES)
def test_chunks_of_any_size_agree_bit_for_bit(name):
    model, rows = family(name), tokens(name)
    whole = bytes(Chain(model).push(rows).payload)
    for sizes in ([1] * len(rows), [1, 2, 13, 32], [47, 1]):
        chain, parts, at = Chain(model), [], 0
        for size in sizes:
            parts.append(bytes(chain.push(rows[at : at + size]).payload))
            at += size
        assert b"".join(parts) == whole


@pytest.mark.parametrize("name", FAMILIES)
def test_decode_of_ragged_batches_agrees_with_transformers(name):
    """Six sessions at different lengths decode the rest of the same text together."""
    model, rows = family(name), tokens(name)
    driver = Driver(model.hosted())
    lengths = [3, 9, 17, 20, 31, 40]
    for number, length in enumerate(lengths):
        driver.core.open(name_of(number), model.digest, model.whole, len(rows))
        driver.run(step_of(name_of(number), 0, rows[:length], logits_from=length))
    for offset in range(len(rows) - max(lengths)):
        steps = [
            step_of(name_of(number), length + offset, rows[length + offset :][:1], Phase.DECODE)
            for number, length in enumerate(lengths)
        ]
        for length, stepped in zip(lengths, driver.run(*steps), strict=True):
            error = relative_error(log_probabilities(model, stepped)[0], expected(name)[length + offset])
            assert error < TOLERANCE


@pytest.mark.parametrize("name", FAMILIES)
def test_a_rewound_session_forgets(name):
    model, rows = family(name), tokens(name)
    chain = Chain(model)
    chain.push(rows[:20])
    chain.push(rows[:17])
    chain.rewind(20)
    stepped = chain.push(rows[20:])
    assert relative_error(log_probabilities(model, stepped), expected(name)[20:]) < TOLERANCE


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_decoding_gives_the_reference_tokens(name):
    chain, known = Chain(family(name)), reference(name)
    stepped = chain.push(tokens(name), logits_from=len(tokens(name)) - 1, top_k=1)
    greedy = []
    while True:
        greedy.append(int(np.frombuffer(stepped.payload, np.int32, 1)[0]))
        if len(greedy) == len(known["greedy"]):
            break
        stepped = chain.push(greedy[-1:], Phase.DECODE, top_k=1)
    assert greedy == known["greedy"].tolist()


@pytest.mark.parametrize("quantisation", [Quantisation.Q8, Quantisation.Q4])
@pytest.mark.parametrize("name", FAMILIES)
def test_quantised_splits_agree_bit_for_bit_through_float16_rows(name, quantisation):
    model = family(name, quantisation)
    answers = set()
    for pieces in every_split(model.layer_count):
        chain = Chain(model, *pieces)
        prompt = chain.push(tokens(name)[:30])
        decoded = [bytes(chain.push([token], Phase.DECODE).payload) for token in tokens(name)[30:36]]
        answers.add((bytes(prompt.payload), *decoded))
    assert len(answers) == 1


def test_a_deep_model_is_rounded_at_its_cut_points_alone():
    config = family("llama").manifest.config
    deep = msgspec.structs.replace(config, layer_count=30)
    assert cut_points(30) == (3, 6, 9, 12, 15, 18, 21, 24, 27)
    graph = onnx.load_from_string(piece_graph(deep, Quantisation.Q8, Span(3, 12), 64).serialised()).graph
    rounded = [node for node in graph.node if node.op_type == "Cast"]
    assert len(rounded) == 2 * 2 + 2  # two inner cuts, the way in and the way out


def test_a_piece_outside_the_model_is_refused():
    with pytest.raises(EngineError, match=r"\[3,9\)"):
        piece_graph(family("llama").manifest.config, Quantisation.F32, Span(3, 9), 64)

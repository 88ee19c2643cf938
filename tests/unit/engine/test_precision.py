"""Products at 16 bits, and logits near the top in float32: what they promise, whatever a row's company."""

import numpy as np
import onnxruntime as ort
import pytest
from engine_world import family
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from fallow.domain.model import Quantisation
from fallow.engine.graph import _Builder
from fallow.engine.precision import Activations, Matrix, activations
from fallow.engine.rescore import MARGIN_NATS, RESCORED_MAX, Rescorer
from fallow.models.quantise import dequantise, q8_from_values
from fallow.models.tensors import Part

COLUMNS, ROWS = 96, 64


def matrix(seed):
    codes, scales = q8_from_values(np.random.default_rng(seed).standard_normal((ROWS, COLUMNS)).astype(np.float32))
    return codes, scales, dequantise(codes, scales, Quantisation.Q8)


def outlying_rows(seed, count):
    """Rows with one channel a hundred times larger than its neighbours, as hidden rows have them."""
    rows = np.random.default_rng(seed).standard_normal((count, COLUMNS)).astype(np.float32)
    rows[:, 7] *= 100
    return rows


def product_session(precision, *, with_bias=False):
    """A graph of one product, `x [B, S, COLUMNS]` to `y [B, S, ROWS]`, over the matrix of seed 0."""
    builder = _Builder(family("qwen2").manifest.config, Quantisation.Q8, Part.LAYER)
    graph = builder.graph
    x = graph.input("x", TensorProto.FLOAT, ("B", "S", COLUMNS))
    linear = builder._linear if precision is Activations.INT8 else builder._linear_twice
    product = linear(x, "w", ROWS, COLUMNS, bias="bias" if with_bias else None)
    graph.node("Identity", [product], name=graph.output("y", TensorProto.FLOAT, ("B", "S", ROWS)))
    codes, scales, _ = matrix(0)
    arrays = {"w.q": codes, "w.scales": scales}
    if with_bias:
        arrays["bias"] = np.arange(ROWS, dtype=np.float32)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    values = [ort.OrtValue.ortvalue_from_numpy(array) for array in arrays.values()]
    options.add_external_initializers(list(arrays), values)
    session = ort.InferenceSession(graph.serialised(), options, providers=["CPUExecutionProvider"])
    return lambda rows: session.run(["y"], {"x": rows})[0]


def test_sixteen_bits_are_a_hundred_times_closer_where_a_channel_sticks_out():
    rows = outlying_rows(1, 20)
    exact = rows.astype(np.float64) @ matrix(0)[2].T
    errors = {kind: np.abs(product_session(kind)(rows[None])[0] - exact).max() for kind in Activations}
    assert errors[Activations.INT16] < errors[Activations.INT8] / 100


def test_a_bias_is_added_once():
    rows = outlying_rows(2, 5)[None]
    with_bias = product_session(Activations.INT16, with_bias=True)(rows)
    assert np.allclose(with_bias, product_session(Activations.INT16)(rows) + np.arange(ROWS), rtol=1e-5, atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1 << 20), st.integers(1, 40))
def test_a_row_has_the_same_bits_alone_in_a_batch_and_in_a_chunk(seed, count):
    rows, run = outlying_rows(seed, count), product_session(Activations.INT16)
    chunk, batch = run(rows[None])[0], run(rows[:, None])[:, 0]
    alone = np.concatenate([run(row[None, None])[0] for row in rows])
    assert np.array_equal(chunk, batch)
    assert np.array_equal(chunk, alone)


def test_rules_of_precision():
    def twice(layer, stored=Quantisation.Q8):
        return {matrix for matrix in Matrix if activations(stored, layer, 30, matrix) is Activations.INT16}

    assert [layer for layer in range(30) if Matrix.GATE in twice(layer)] == [0, 1, 2, 26, 27, 28, 29]
    assert [layer for layer in range(30) if Matrix.DOWN in twice(layer)] == [*range(10), 26, 27, 28, 29]
    assert all(Matrix.QKV in twice(layer) for layer in range(30))
    assert not any(Matrix.ATTENTION_OUT in twice(layer) for layer in range(30))
    assert not any(twice(layer, stored) for layer in range(30) for stored in (Quantisation.Q4, Quantisation.F32))


@pytest.mark.parametrize("layer_count", [1, 2, 4, 7])
def test_the_last_layer_is_always_at_the_edge(layer_count):
    assert activations(Quantisation.Q8, layer_count - 1, layer_count, Matrix.UP) is Activations.INT16


VOCABULARY = 3000


def head(seed):
    codes, scales = q8_from_values(
        np.random.default_rng(seed).standard_normal((VOCABULARY, COLUMNS)).astype(np.float32)
    )
    return Rescorer(codes, scales), dequantise(codes, scales, Quantisation.Q8)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1 << 20), st.sampled_from([0.05, 0.5, 1.0]))
def test_what_is_near_the_top_becomes_exact_and_the_rest_stays(seed, spread):
    rescorer, weights = head(0)
    random = np.random.default_rng(seed)
    normed = (random.standard_normal(COLUMNS) * spread).astype(np.float32)
    exact = weights.astype(np.float64) @ normed
    rough = (exact + random.normal(0, 0.06, VOCABULARY)).astype(np.float32)
    logits = rough.copy()
    rescorer.rescore(logits, normed)
    order = np.argsort(-rough, kind="stable")
    near = order[: min(RESCORED_MAX, int((rough >= rough.max() - np.float32(MARGIN_NATS)).sum()))]
    assert np.allclose(logits[near], exact[near], rtol=1e-5, atol=1e-4)
    far = np.setdiff1d(np.arange(VOCABULARY), near)
    assert np.array_equal(logits[far], rough[far])
    assert logits.argmax() == exact.argmax()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_left_for_the_fault_to_be_found(bad):
    rescorer, _ = head(0)
    logits = np.zeros(VOCABULARY, np.float32)
    logits[5] = bad
    rescorer.rescore(logits, np.ones(COLUMNS, np.float32))
    assert not np.isfinite(logits[5])

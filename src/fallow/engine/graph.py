"""The ONNX graph of one piece of a decoder, and of its head. Pure: a shape in, a graph out; no weights, no I/O.

Rules
- Rows enter as `x [B, S, H]` in the wire type and leave as `y [B, S, H]`: in the wire type at an inner edge, float32
  after the last layer, where the head (a graph of its own, so that rows without logits never pay for it) takes over.
- Attention is `com.microsoft.GroupQueryAttention`, which appends to the KV cache in place when `k3` and `k3_out` are
  bound to the same memory, and whose cost follows the valid length (`docs/adr/0004-attention-kernel.md`). It computes
  B > 1 only with S = 1.
- The residual stream is rounded to the wire type at every cut point, and is added and normalised there by the same
  nodes as at an edge, so that a cut never changes a bit.
- Matrix products of 8-bit and 4-bit weights round their input rows to 8 bits, or to 16 in two steps (`precision.py`).
- Weights are external initialisers, named `l<layer>.<tensor>` (`weights.py` gives the arrays).

Inputs besides `x`: `positions [B, S]` int64 (rotary), `lengths [B]` int32 (past + S - 1), `longest [1]` int32
(max(past) + S + 1; equal to S it would select the kernel's first-prompt branch, which ignores the cache), and per layer
`k<i>`, `v<i>` float32 `[B, kv_heads, L, head_dim]`. The head takes `x [R, H]` float32 and gives `logits [R, V]`
and `normed [R, H]`, the rows that the matrix was multiplied with.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from fallow.domain.errors import EngineError
from fallow.domain.model import ModelConfig, Quantisation, Span, cut_points
from fallow.engine.precision import Activations, Matrix, activations
from fallow.models.quantise import Q8_ZERO
from fallow.models.rope_factors import llama3_factors
from fallow.models.tensors import BLOCK, Part, matrix_quantisation

MICROSOFT = "com.microsoft"
IR_VERSION = 10
OPSET = 21

Shape = tuple[int | str, ...]


def wire_dtype(quantisation: Quantisation) -> np.dtype[Any]:
    """The type of hidden rows between pieces."""
    return np.dtype(np.float32 if quantisation is Quantisation.F32 else np.float16)


def piece_graph(config: ModelConfig, quantisation: Quantisation, piece: Span, max_len: int) -> "Graph":
    """The graph of layers `piece`, with rotary tables of `max_len` positions."""
    if not 0 <= piece.first < piece.last <= config.layer_count:
        raise EngineError(f"piece {piece} is not inside the model's {config.layer_count} layers")
    builder = _Builder(config, quantisation, Part.LAYER)
    builder.piece(piece, max_len)
    return builder.graph


def head_graph(config: ModelConfig, quantisation: Quantisation) -> "Graph":
    """Final norm and output matrix: `x [R, H]` float32 to `logits [R, V]` and `normed [R, H]`."""
    builder = _Builder(config, quantisation, Part.HEAD)
    builder.head()
    return builder.graph


class Graph:
    """A graph under construction: nodes, and the initialisers that it needs by name."""

    def __init__(self) -> None:
        self.initialisers: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}
        self._names = _numbers()

    def node(
        self, op: str, inputs: Sequence[str], *, domain: str = "", name: str | None = None, **attributes: Any
    ) -> str:
        """Add a node with one output, named `name` when given, and return the output's name."""
        return self.node_many(op, inputs, [name or f"{op}_{next(self._names)}"], domain=domain, **attributes)[0]

    def node_many(
        self, op: str, inputs: Sequence[str], outputs: Sequence[str], *, domain: str = "", **attributes: Any
    ) -> Sequence[str]:
        label = f"{op}#{next(self._names)}"
        self._nodes.append(helper.make_node(op, inputs, outputs, domain=domain, name=label, **attributes))
        return outputs

    def fresh(self, prefix: str) -> str:
        return f"{prefix}_{next(self._names)}"

    def input(self, name: str, kind: int, shape: Shape) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, name: str, kind: int, shape: Shape) -> str:
        self._outputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def initialiser(self, name: str, dtype: type[np.generic], shape: tuple[int, ...]) -> str:
        """Declare a weight that the session is given from outside."""
        self.initialisers[name] = (np.dtype(dtype), shape)
        return name

    def shape_constant(self, values: tuple[int, ...]) -> str:
        name = "shape_" + "_".join(str(value) for value in values)
        self._constants[name] = helper.make_tensor(name, TensorProto.INT64, [len(values)], values)
        return name

    def identity(self) -> tuple[str, str]:
        """The identity matrix of one block in 8 bits: codes and scales."""
        codes = np.full((BLOCK, 1, BLOCK), Q8_ZERO, np.uint8)
        codes[np.arange(BLOCK), 0, np.arange(BLOCK)] += 1
        scales = np.ones((BLOCK, 1), np.float32)
        for name, array in (("identity.q", codes), ("identity.scales", scales)):
            self._constants[name] = numpy_helper.from_array(array, name)
        return "identity.q", "identity.scales"

    def serialised(self) -> bytes:
        """The model's bytes: a few kilobytes, whatever the weights' size."""
        external = [_external(name, dtype, shape) for name, (dtype, shape) in self.initialisers.items()]
        initialisers = [*self._constants.values(), *external]
        graph = helper.make_graph(self._nodes, "piece", self._inputs, self._outputs, initialisers)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        encoded: bytes = helper.make_model(graph, ir_version=IR_VERSION, opset_imports=opsets).SerializeToString()
        return encoded


class _Builder:
    """Writes a decoder's layers into a `Graph`."""

    def __init__(self, config: ModelConfig, quantisation: Quantisation, part: Part) -> None:
        self.config = config
        self.graph = Graph()
        self.stored = matrix_quantisation(quantisation, part)
        self._halves: dict[str, str] = {}
        self.wire = helper.np_dtype_to_tensor_dtype(wire_dtype(quantisation))

    def piece(self, piece: Span, max_len: int) -> None:
        graph, config = self.graph, self.config
        hidden: Shape = ("B", "S", config.hidden_size)
        graph.input("positions", TensorProto.INT64, ("B", "S"))
        graph.input("lengths", TensorProto.INT32, ("B",))
        graph.input("longest", TensorProto.INT32, (1,))
        for table in ("rope.cos", "rope.sin"):
            graph.initialiser(table, np.float32, (max_len, config.head_dim // 2))
        residual = self._widen(graph.input("x", self.wire, hidden))
        cuts = set(cut_points(config.layer_count))
        pending: str | None = None
        for layer in range(piece.first, piece.last):
            if pending is not None and layer in cuts:
                residual, pending = self._widen(self._round(graph.node("Add", [residual, pending]))), None
            residual, pending = self._layer(layer, residual, pending)
        assert pending is not None
        if piece.last == config.layer_count:
            graph.node("Add", [residual, pending], name=graph.output("y", TensorProto.FLOAT, hidden))
        elif self.wire == TensorProto.FLOAT:
            graph.node("Add", [residual, pending], name=graph.output("y", self.wire, hidden))
        else:
            total = graph.node("Add", [residual, pending])
            graph.node("Cast", [total], name=graph.output("y", self.wire, hidden), to=self.wire)

    def head(self) -> None:
        graph, config = self.graph, self.config
        x = graph.input("x", TensorProto.FLOAT, ("R", config.hidden_size))
        graph.output("logits", TensorProto.FLOAT, ("R", config.vocab_size))
        normed = self._norm(x, "final_norm", name=graph.output("normed", TensorProto.FLOAT, ("R", config.hidden_size)))
        self._linear(normed, "head", config.vocab_size, config.hidden_size, output="logits")

    def _layer(self, layer: int, residual: str, pending: str | None) -> tuple[str, str]:
        """One decoder layer. Returns the residual stream and the last block's output, not yet added to it."""
        config, prefix = self.config, f"l{layer}."
        query_size = config.head_count * config.head_dim
        normed, residual = self._add_and_norm(residual, pending, prefix + "attention_norm")
        attended = self._attention(layer, normed)
        projected = self._product(layer, Matrix.ATTENTION_OUT, attended, config.hidden_size, query_size)
        normed, residual = self._add_and_norm(residual, projected, prefix + "mlp_norm")
        gate = self._product(layer, Matrix.GATE, normed, config.intermediate_size, config.hidden_size)
        up = self._product(layer, Matrix.UP, normed, config.intermediate_size, config.hidden_size)
        active = self.graph.node("QuickGelu", [gate], domain=MICROSOFT, alpha=1.0)  # alpha 1 is SiLU
        mixed = self.graph.node("Mul", [active, up])
        return residual, self._product(layer, Matrix.DOWN, mixed, config.hidden_size, config.intermediate_size)

    def _attention(self, layer: int, normed: str) -> str:
        graph, config, prefix = self.graph, self.config, f"l{layer}."
        query, key_value = config.head_count * config.head_dim, config.kv_head_count * config.head_dim
        bias = prefix + "qkv_bias" if config.qkv_bias else None
        packed = self._product(layer, Matrix.QKV, normed, query + 2 * key_value, config.hidden_size, bias=bias)
        inputs = [packed, "", ""]
        if config.qk_norm:
            # The kernel's own q/k norm inputs are not for CPU.
            sizes = graph.shape_constant((query, key_value, key_value))
            names = [graph.fresh("q"), graph.fresh("k"), graph.fresh("v")]
            q, k, v = graph.node_many("Split", [packed, sizes], names, axis=2)
            inputs = [self._head_norm(q, prefix + "q_norm", query), self._head_norm(k, prefix + "k_norm", key_value), v]
        shape: Shape = ("B", config.kv_head_count, "L", config.head_dim)
        caches = [graph.input(f"{kind}{layer}", TensorProto.FLOAT, shape) for kind in "kv"]
        grown = [graph.output(f"{kind}{layer}_out", TensorProto.FLOAT, shape) for kind in "kv"]
        graph.node_many(
            "GroupQueryAttention",
            [*inputs, *caches, "lengths", "longest", "rope.cos", "rope.sin", "positions"],
            [f"attended{layer}", *grown],
            domain=MICROSOFT,
            num_heads=config.head_count,
            kv_num_heads=config.kv_head_count,
            do_rotary=1,
            rotary_interleaved=0,
            scale=1.0,  # `rope_tables` has done it: only products that are not scaled take the runtime's fast path
        )
        return f"attended{layer}"

    def _head_norm(self, x: str, weight: str, size: int) -> str:
        """RMS norm of every head by itself, `[B, S, size]` in and out."""
        graph, head_dim = self.graph, self.config.head_dim
        heads = graph.node("Reshape", [x, graph.shape_constant((0, 0, size // head_dim, head_dim))])
        normed = self._norm(heads, weight, head_dim)
        return graph.node("Reshape", [normed, graph.shape_constant((0, 0, size))])

    def _product(self, layer: int, matrix: Matrix, x: str, rows: int, columns: int, *, bias: str | None = None) -> str:
        """The product with a layer's matrix, at the precision that is due to it."""
        precision = activations(self.stored, layer, self.config.layer_count, matrix)
        linear = self._linear if precision is Activations.INT8 else self._linear_twice
        return linear(x, f"l{layer}.{matrix}", rows, columns, bias=bias)

    def _linear(
        self, x: str, name: str, rows: int, columns: int, *, bias: str | None = None, output: str | None = None
    ) -> str:
        """`x @ W.T (+ bias)` for `W [rows, columns]` as stored."""
        graph = self.graph
        if bias is not None:
            graph.initialiser(bias, np.float32, (rows,))
        if self.stored is Quantisation.F32:
            weight = graph.initialiser(name, np.float32, (rows, columns))
            product = graph.node("FusedMatMul", [x, weight], domain=MICROSOFT, transB=1, name=None if bias else output)
            return product if bias is None else graph.node("Add", [product, bias], name=output)
        extra = [] if bias is None else ["", "", bias]  # zero points, group index
        return self._quantised([x, *self._codes(name, rows, columns), *extra], rows, columns, self._bits, output)

    def _linear_twice(self, x: str, name: str, rows: int, columns: int, *, bias: str | None = None) -> str:
        """The same with `x` as the sum of what the kernel makes of it and of the rest, both in one call.

        Two rows cost 1.2 times one; the sum is as good as float32 activations.
        """
        graph = self.graph
        both = self._halves.get(x) or self._halve(x, columns)
        self._halves[x] = both
        products = self._quantised([both, *self._codes(name, rows, columns)], rows, columns, self._bits)
        first, second = graph.node_many(
            "Split", [products], [graph.fresh("a"), graph.fresh("b")], axis=0, num_outputs=2
        )
        if bias is None:
            return graph.node("Add", [first, second])
        return graph.node("Sum", [first, second, graph.initialiser(bias, np.float32, (rows,))])

    def _halve(self, x: str, columns: int) -> str:
        """`[B, S, K]` to `[2B, S, K]`: the rows, and what is left of them after the kernel's rounding.

        What the kernel rounds a block to is its product with the identity matrix, since rounding goes by blocks.
        """
        graph = self.graph
        blocks = graph.node("Reshape", [x, graph.shape_constant((0, 0, columns // BLOCK, BLOCK))])
        rounded = self._quantised([blocks, *graph.identity()], BLOCK, BLOCK, bits=8)
        rest = graph.node("Sub", [blocks, rounded])
        both = graph.node("Concat", [blocks, rest], axis=0)
        return graph.node("Reshape", [both, graph.shape_constant((0, 0, columns))])

    @property
    def _bits(self) -> int:
        return 8 if self.stored is Quantisation.Q8 else 4

    def _codes(self, name: str, rows: int, columns: int) -> tuple[str, str]:
        """The stored matrix: its codes and its scales."""
        blocks = columns // BLOCK
        codes = self.graph.initialiser(f"{name}.q", np.uint8, (rows, blocks, BLOCK * self._bits // 8))
        return codes, self.graph.initialiser(f"{name}.scales", np.float32, (rows, blocks))

    def _quantised(self, inputs: Sequence[str], rows: int, columns: int, bits: int, output: str | None = None) -> str:
        return self.graph.node(
            "MatMulNBits",
            inputs,
            domain=MICROSOFT,
            name=output,
            K=columns,
            N=rows,
            bits=bits,
            block_size=BLOCK,
            accuracy_level=4,  # int8 activations: twice as fast as float32 ones
        )

    def _norm(self, x: str, weight: str, size: int | None = None, name: str | None = None) -> str:
        scale = self.graph.initialiser(weight, np.float32, (size or self.config.hidden_size,))
        epsilon = self.config.norm_epsilon
        return self.graph.node(
            "SimplifiedLayerNormalization", [x, scale], name=name, axis=-1, epsilon=epsilon, stash_type=1
        )

    def _add_and_norm(self, residual: str, addend: str | None, weight: str) -> tuple[str, str]:
        """RMS norm of `residual + addend`; returns (normed, sum)."""
        if addend is None:
            return self._norm(residual, weight), residual
        graph = self.graph
        scale = graph.initialiser(weight, np.float32, (self.config.hidden_size,))
        normed, total = graph.fresh("normed"), graph.fresh("residual")
        graph.node_many(
            "SkipSimplifiedLayerNormalization",
            [residual, addend, scale],
            [normed, "", "", total],
            domain=MICROSOFT,
            epsilon=self.config.norm_epsilon,
        )
        return normed, total

    def _round(self, x: str) -> str:
        return x if self.wire == TensorProto.FLOAT else self.graph.node("Cast", [x], to=self.wire)

    def _widen(self, x: str) -> str:
        return x if self.wire == TensorProto.FLOAT else self.graph.node("Cast", [x], to=TensorProto.FLOAT)


def rope_tables(config: ModelConfig, max_len: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines of the rotary angles, float32 `[max_len, head_dim / 2]` each, half-split order.

    Both are scaled by `head_dim ** -0.25`: queries and keys go through them, so their products come out as attention
    wants them, scaled by the root of the head's size.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    frequencies = config.rope_theta**-exponents
    if config.rope_scaling is not None:
        frequencies = frequencies / llama3_factors(config.rope_scaling, config.head_dim, config.rope_theta)
    angles = np.arange(max_len, dtype=np.float64)[:, None] * frequencies
    scale = config.head_dim**-0.25
    return (np.cos(angles) * scale).astype(np.float32), (np.sin(angles) * scale).astype(np.float32)


def _external(name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> onnx.TensorProto:
    kind = helper.np_dtype_to_tensor_dtype(dtype)
    tensor = TensorProto(name=name, data_type=kind, dims=shape, data_location=TensorProto.EXTERNAL)
    length = int(np.prod(shape)) * dtype.itemsize
    for key, value in (("location", "weights"), ("offset", "0"), ("length", str(length))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return tensor


def _numbers() -> Iterator[int]:
    number = 0
    while True:
        yield number
        number += 1

"""Time and memory of the coupling analysis on GPT-shaped graphs of growing depth.

    python tools/bench/analysis.py [--width 1600] [--heads 25] [--layers 1 2 4 8 16 32 48]

The graphs are shaped like GPT-2 (48 layers of width 1600: 1.5 billion parameters): learned positions, layer norms,
queries, keys and values in one product that is split, heads by Reshape and Transpose, a causal mask, Gelu. Weights are
never materialised: reading one ends the run. Every size runs in a process of its own; memory is the high-water mark of
its resident set (VmHWM).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import onnx_ir as ir

SMALL = 4096
"""Bytes of a tensor that shape inference reads: what is that small may be a size."""


class Unread(ir.TensorProtocol):
    """A float tensor that has a shape and no elements."""

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        self.name: str | None = name
        self.doc_string: str | None = None
        self.raw = None
        self.shape = ir.Shape(shape)
        self.dtype = ir.DataType.FLOAT
        self.meta: dict[str, Any] = {}
        self.metadata_props: dict[str, str] = {}

    @property
    def size(self) -> int:
        return int(np.prod(self.shape.numpy()))

    @property
    def nbytes(self) -> int:
        return 4 * self.size

    def numpy(self) -> NoReturn:
        raise AssertionError(f"the analysis reads the weight {self.name}")

    __array__ = __dlpack__ = __dlpack_device__ = tobytes = numpy


class Builder:
    """Grows one graph node by node."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []

    def weight(self, *shape: int) -> ir.Value:
        name = f"w{len(self.initializers)}"
        tensor: ir.TensorProtocol = Unread(name, shape)
        if tensor.nbytes <= SMALL:
            tensor = ir.Tensor(np.ones(shape, np.float32), name=name)
        value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
        self.initializers.append(value)
        return value

    def constant(self, *values: Any, scalar: bool = False) -> ir.Value:
        array = np.asarray(values[0] if scalar else values)
        array = array.astype(np.float32 if array.dtype.kind == "f" else np.int64)
        name = f"c{len(self.initializers)}"
        value = ir.Value(name=name, const_value=ir.Tensor(array, name=name), shape=ir.Shape(array.shape))
        value.dtype = ir.DataType.from_numpy(array.dtype)
        self.initializers.append(value)
        return value

    def add(self, op: str, *inputs: ir.Value | None, outputs: int = 1, **attributes: Any) -> Any:
        node = ir.node(op, inputs, attributes=attributes, num_outputs=outputs, name=f"n{len(self.nodes)}_{op}")
        for k, value in enumerate(node.outputs):
            value.name = f"t{len(self.nodes)}_{k}"
        self.nodes.append(node)
        return node.outputs[0] if outputs == 1 else node.outputs


def gpt(layers: int, width: int, heads: int, vocabulary: int = 50257, positions: int = 1024) -> ir.Model:
    """The graph; nothing is inferred yet."""
    b = Builder()
    tokens = ir.Value(name="tokens", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["batch", "time"]))
    places = ir.Value(name="places", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["batch", "time"]))
    mask = ir.Value(name="mask", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", 1, "time", "time"]))
    table = b.weight(vocabulary, width)
    x = b.add("Add", b.add("Gather", table, tokens), b.add("Gather", b.weight(positions, width), places))
    size = width // heads
    for _ in range(layers):
        y = b.add("LayerNormalization", x, b.weight(width), b.weight(width))
        y = b.add("Add", b.add("MatMul", y, b.weight(width, 3 * width)), b.weight(3 * width))
        parts = b.add("Split", y, b.constant(width, width, width), axis=2, outputs=3)
        split = [b.add("Reshape", part, b.constant(0, 0, heads, size)) for part in parts]
        q, k, v = (
            b.add("Transpose", part, perm=perm)
            for part, perm in zip(split, ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]), strict=True)
        )
        scores = b.add("Div", b.add("MatMul", q, k), b.constant(float(np.sqrt(size)), scalar=True))
        shares = b.add("Softmax", b.add("Add", scores, mask), axis=3)
        y = b.add("Transpose", b.add("MatMul", shares, v), perm=[0, 2, 1, 3])
        y = b.add("Reshape", y, b.constant(0, 0, width))
        x = b.add("Add", x, b.add("Add", b.add("MatMul", y, b.weight(width, width)), b.weight(width)))
        y = b.add("LayerNormalization", x, b.weight(width), b.weight(width))
        y = b.add("Gelu", b.add("Add", b.add("MatMul", y, b.weight(width, 4 * width)), b.weight(4 * width)))
        x = b.add("Add", x, b.add("Add", b.add("MatMul", y, b.weight(4 * width, width)), b.weight(width)))
    y = b.add("LayerNormalization", x, b.weight(width), b.weight(width))
    logits = b.add("MatMul", y, b.add("Transpose", table, perm=[1, 0]))
    logits.type = ir.TensorType(ir.DataType.FLOAT)
    logits.shape = ir.Shape(["batch", "time", vocabulary])
    graph = ir.Graph(
        [tokens, places, mask],
        [logits],
        nodes=b.nodes,
        initializers=b.initializers,
        opset_imports={"": 20},
        name="gpt",
    )
    return ir.Model(graph, ir_version=9)


def measure(layers: int, width: int, heads: int) -> str:
    """One row of the table."""
    from graphopt.analysis.units import analyse
    from graphopt.model import infer_shapes

    model = gpt(layers, width, heads)
    infer_shapes(model)
    start = time.perf_counter()
    coupling = analyse(model)
    seconds = time.perf_counter() - start
    parameters = sum(v.const_value.size for v in model.graph.initializers.values() if v.const_value is not None)
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    cells = [layers, f"{parameters / 1e6:.0f} M", len(list(model.graph)), len(coupling.units)]
    return f"| {' | '.join(map(str, [*cells, f'{seconds:.2f}', f'{int(peak.split()[1]) / 1024:.0f}']))} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 48])
    parser.add_argument("--width", type=int, default=1600)
    parser.add_argument("--heads", type=int, default=25)
    options = parser.parse_args()
    if len(options.layers) == 1:
        print(measure(options.layers[0], options.width, options.heads), flush=True)
        return 0
    print("| layers | parameters | nodes | units | seconds | MB |\n|---|---|---|---|---|---|", flush=True)
    for layers in options.layers:
        command = [sys.executable, __file__, "--layers", str(layers)]
        command += ["--width", str(options.width), "--heads", str(options.heads)]
        if subprocess.run(command, check=False).returncode:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

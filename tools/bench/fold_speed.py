"""How the time of `fold` grows with the number of nodes: transformer blocks as an exporter writes them.

    python tools/bench/fold_speed.py [--nodes 1000 2000 5000 10000 20000] [--plot docs/fold_speed.svg] [--profile]

A block is attention with a decomposed LayerNorm, head splits through Shape, Gather, Concat and Reshape, a decomposed
Gelu, biases, residual sums, and what exporters leave behind: Identity, Dropout, Constant nodes, casts to the type they
have, scales. Batch and sequence are symbolic. Seconds are those of the pass alone, without loading and imports, in the
best of `--repeat` runs; those of the processor are what a busy machine leaves comparable. `--plot` draws the seconds on
logarithmic axes beside a line of slope one.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir

from graphopt.base import Context
from graphopt.model import infer_shapes
from graphopt.progress import Silent
from graphopt.registry import pass_class, target
from graphopt.rewriting.size import size

WIDTH, HEADS = 32, 4


class Builder:
    """Collects the nodes of one graph; small weights, since only their number matters here."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []

    def node(self, op: str, *inputs: ir.Value, **attributes: int | float | list[int]) -> ir.Value:
        made = ir.node(op, list(inputs), attributes=attributes, name=f"{op}_{len(self.nodes)}")
        made.outputs[0].name = f"v{len(self.nodes)}"
        self.nodes.append(made)
        return made.outputs[0]

    def weight(self, *shape: int) -> ir.Value:
        array = self.random.normal(size=shape).astype(np.float32) * 0.1
        name = f"w{len(self.initializers)}"
        value = ir.Value(name=name, const_value=ir.Tensor(array, name=name))
        value.shape, value.dtype = ir.Shape(shape), ir.DataType.FLOAT
        self.initializers.append(value)
        return value

    def constant(self, number: float | int | list[int]) -> ir.Value:
        array = np.array(number, np.float32 if isinstance(number, float) else np.int64)
        made = ir.node("Constant", [], attributes={"value": ir.Tensor(array)}, name=f"Constant_{len(self.nodes)}")
        made.outputs[0].name = f"v{len(self.nodes)}"
        self.nodes.append(made)
        return made.outputs[0]

    # -- a transformer block ------------------------------------------------------------------------------------------

    def norm(self, x: ir.Value) -> ir.Value:
        centred = self.node("Sub", x, self.node("ReduceMean", x, axes=[-1]))
        variance = self.node("ReduceMean", self.node("Pow", centred, self.constant(2.0)), axes=[-1])
        deviation = self.node("Sqrt", self.node("Add", variance, self.constant(1e-5)))
        scaled = self.node("Mul", self.node("Div", centred, deviation), self.weight(WIDTH))
        return self.node("Add", scaled, self.weight(WIDTH))

    def linear(self, x: ir.Value, inputs: int, outputs: int) -> ir.Value:
        return self.node("Add", self.node("MatMul", x, self.weight(inputs, outputs)), self.weight(outputs))

    def size(self, x: ir.Value, axis: int) -> ir.Value:
        picked = self.node("Gather", self.node("Shape", x), self.constant(axis), axis=0)
        return self.node("Unsqueeze", picked, self.constant([0]))

    def heads(self, x: ir.Value) -> ir.Value:
        sizes = [self.size(x, 0), self.size(x, 1), self.constant([HEADS]), self.constant([WIDTH // HEADS])]
        return self.node("Transpose", self.node("Reshape", x, self.node("Concat", *sizes, axis=0)), perm=[0, 2, 1, 3])

    def block(self, x: ir.Value) -> ir.Value:
        y = self.norm(x)
        query, key, value = (self.heads(self.linear(y, WIDTH, WIDTH)) for _ in range(3))
        scores = self.node("MatMul", query, self.node("Transpose", key, perm=[0, 1, 3, 2]))
        scale = self.node("Sqrt", self.constant(float(WIDTH // HEADS)))
        weights = self.node("Dropout", self.node("Softmax", self.node("Div", scores, scale), axis=-1))
        mixed = self.node("Transpose", self.node("MatMul", weights, value), perm=[0, 2, 1, 3])
        target_shape = self.node("Concat", self.size(x, 0), self.size(x, 1), self.constant([WIDTH]), axis=0)
        x = self.node("Add", x, self.linear(self.node("Reshape", mixed, target_shape), WIDTH, WIDTH))
        hidden = self.linear(self.node("Identity", self.norm(x)), WIDTH, 2 * WIDTH)
        erf = self.node("Erf", self.node("Div", hidden, self.constant(math.sqrt(2.0))))
        gelu = self.node("Mul", self.node("Mul", hidden, self.node("Add", erf, self.constant(1.0))), self.constant(0.5))
        out = self.linear(self.node("Cast", gelu, to=1), 2 * WIDTH, WIDTH)
        return self.node("Add", x, out)


def transformer(nodes: int) -> ir.Model:
    """A model of about so many nodes (Constant nodes not counted)."""
    builder = Builder()
    source = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", "sequence", WIDTH]))
    value: ir.Value = source
    while sum(node.op_type != "Constant" for node in builder.nodes) < nodes:
        value = builder.block(value)
    value.shape, value.dtype = ir.Shape(["batch", "sequence", WIDTH]), ir.DataType.FLOAT
    graph = ir.Graph(
        [source], [value], nodes=builder.nodes, initializers=builder.initializers, opset_imports={"": 17}, name="speed"
    )
    model = ir.Model(graph, ir_version=8)
    infer_shapes(model)
    return model


def measure(nodes: int, repeat: int) -> tuple[int, int, float, float]:
    """Nodes before, nodes after, seconds, seconds of processor time."""
    best = busy = math.inf
    before = after = 0
    original = transformer(nodes)
    for _ in range(repeat):
        model = original.clone()
        before = size(model).nodes
        start, began = time.perf_counter(), time.process_time()
        fold(model)
        best, busy = min(best, time.perf_counter() - start), min(busy, time.process_time() - began)
        after = size(model).nodes
    return before, after, best, busy


def fold(model: ir.Model) -> None:
    ctx = Context(target("cpu"), None, None, seed=0, jobs=1, progress=Silent(), resolve=pass_class)
    pass_class("fold")().run(model, ctx)


def plot(rows: list[tuple[int, int, float]]) -> str:
    """The times as SVG, on logarithmic axes, with a dashed line of slope one through the first."""
    width, height, margin = 480, 300, 56
    xs, ys = [math.log10(n) for n, _, _ in rows], [math.log10(s) for _, _, s in rows]
    low, high = math.floor(min(ys)), math.ceil(max(*ys, ys[0] + xs[-1] - xs[0]))

    def at(x: float, y: float) -> str:
        across = margin + (x - xs[0]) / max(xs[-1] - xs[0], 1e-9) * (width - 2 * margin)
        return f"{across:.1f},{height - margin - (y - low) / (high - low) * (height - 2 * margin):.1f}"

    def words(x: float, y: float, text: str, anchor: str) -> str:
        return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" fill="#555">{text}</text>'

    marks = [words(*map(float, at(x, low).split(",")), f"{n}", "middle") for x, (n, _, _) in zip(xs, rows, strict=True)]
    marks = [mark.replace(f'y="{height - margin}"', f'y="{height - margin + 18}"') for mark in marks]
    for y in range(low, high + 1):
        marks.append(words(margin - 8, float(at(xs[0], y).split(",")[1]) + 4, f"{10.0**y:g} s", "end"))
        marks.append(f'<polyline points="{at(xs[0], y)} {at(xs[-1], y)}" stroke="#ddd" fill="none"/>')
    line = " ".join(at(x, y) for x, y in zip(xs, ys, strict=True))
    ideal = f"{at(xs[0], ys[0])} {at(xs[-1], ys[0] + xs[-1] - xs[0])}"
    dot = '<circle cx="{}" cy="{}" r="3" fill="#2060c0"/>'
    dots = "".join(dot.format(*at(x, y).split(",")) for x, y in zip(xs, ys, strict=True))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="12"><rect width="{width}" height="{height}" fill="white"/>{"".join(marks)}'
        f'<polyline points="{ideal}" stroke="#999" stroke-dasharray="5 4" fill="none"/>'
        f'<polyline points="{line}" stroke="#2060c0" stroke-width="2" fill="none"/>{dots}'
        f"{words(width / 2, height - 12, 'nodes (dashed: proportional)', 'middle')}</svg>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1000, 2000, 5000, 10000, 20000])
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--plot", type=Path, help="write an SVG")
    parser.add_argument("--profile", action="store_true", help="print where the time of the first size goes")
    args = parser.parse_args()
    if args.profile:
        import cProfile
        import pstats

        model = transformer(args.nodes[0])
        profile = cProfile.Profile()
        profile.runcall(fold, model)
        pstats.Stats(profile).sort_stats("cumulative").print_stats(60)
        return
    print("| nodes | after | seconds | of the processor | microseconds a node |\n|---|---|---|---|---|")
    rows = []
    fold(transformer(100))  # what is imported when it is first needed is no part of the growth
    for nodes in args.nodes:
        before, after, seconds, busy = measure(nodes, args.repeat)
        rows.append((before, after, seconds))
        print(f"| {before} | {after} | {seconds:.2f} | {busy:.2f} | {busy / before * 1e6:.0f} |", flush=True)
    if args.plot:
        args.plot.write_text(plot(rows))


if __name__ == "__main__":
    main()

"""TensorRT's table: what its parser takes, operator by operator, and the parts that it would make of a graph."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import pytest
from text_graph import graph

from graphopt.delegates import delegate, report
from graphopt.model import infer_shapes

X4 = "(float[2,4,8,8] x) => (y)"
REFUSED = {
    "QLinear": ("DynamicQuantizeLinear", "(float[2,4] x) => (y, s, z)", "y, s, z = DynamicQuantizeLinear(x)", {}),
    "Unique": ("has no kernel", "(float[8] x) => (y)", "y = Unique(x)", {}),
    "Det": ("has no kernel", "(float[2,4,4] x) => (y)", "y = Det(x)", {}),
    "bitwise": ("has no kernel", "(int32[4] x) => (y)", "y = BitwiseNot(x)", {}),
    "indices": ("output i is not available", "(float[2,4,8,8] x) => (y, i)",
                "y, i = MaxPool<kernel_shape=[2,2]>(x)", {}),
    "dilated": ("dilations is", X4, "y = MaxPool<kernel_shape=[2,2], dilations=[2,2]>(x)", {}),
    "cubic policy": ("keep_aspect_ratio_policy is", X4, 'y = Resize<keep_aspect_ratio_policy="not_larger">(x, , , to)',
                     {"to": np.array([2, 4, 16, 16])}),
    "antialias": ("antialias is 1", X4, 'y = Resize<antialias=1, mode="linear">(x, , s)',
                  {"s": np.ones(4, np.float32)}),
    "cropping": ("coordinate_transformation_mode is tf_crop_and_resize", X4,
                 'y = Resize<coordinate_transformation_mode="tf_crop_and_resize">(x, roi, s)',
                 {"s": np.ones(4, np.float32), "roi": np.zeros(8, np.float32)}),
    "axes": ("axes is computed", "(float[2,4] x, int64[1] axes) => (y)", "y = ReduceSum(x, axes)", {}),
    "topk": ("K is 4000, not below 3840", "(float[5000] x) => (y, i)", "y, i = TopK(x, k)", {"k": np.array([4000])}),
    "unsorted": ("sorted is 0", "(float[50] x) => (y, i)", "y, i = TopK<sorted=0>(x, k)", {"k": np.array([4])}),
    "einsum": ("other characters", "(float[2,4] x) => (y)", 'y = Einsum<equation="Ij->jI">(x)', {}),
    "scatter": ("reduction is add", "(float[4] x) => (y)", 'y = ScatterND<reduction="add">(x, i, u)',
                {"i": np.array([[1]]), "u": np.ones(1, np.float32)}),
    "rank": ("9 axes", "(float[1,1,1,1,1,1,1,1,2] x) => (y)", "y = Relu(x)", {}),
    "grid": ("5 axes", "(float[1,2,3,3,3] x, float[1,3,3,3,3] g) => (y)", "y = GridSample(x, g)", {}),
    "cast": ("to is 3", "(float[4] x) => (y)", "y = Cast<to=3>(x)", {}),
    "uint8": ("is uint8", "(uint8[4] x) => (y)", "y = Add(x, x)", {}),
    "layout": ("layout is 1", "(float[2,5,3] x) => (y)", "y = LSTM<hidden_size=2, layout=1>(x, w, r)",
               {"w": (1, 8, 3), "r": (1, 8, 2)}),
    "activations": ("of its two directions differ", "(float[5,2,3] x) => (y)",
                    'y = GRU<hidden_size=2, direction="bidirectional", '
                    'activations=["Sigmoid","Tanh","Sigmoid","Relu"]>(x, w, r)',
                    {"w": (2, 6, 3), "r": (2, 6, 2)}),
    "int8 arithmetic": ("come from Cast|is int8", "(float[4] x) => (y)", "c = Cast<to=3>(x)  y = Transpose(c)", {}),
    "int8 pad": ("is int8", "(float[1,4] x) => (y)",
                 "q = QuantizeLinear(x, s, z)  p = Pad(q, pads, z)  y = DequantizeLinear(p, s, z)",
                 {"s": np.array(0.1, np.float32), "z": np.array(0, np.int8), "pads": np.array([0, 1, 0, 1])}),
    "second norm output": ("not available", "(float[2,4] x) => (y, m)", "y, m = LayerNormalization(x, g)", {"g": (4,)}),
}  # fmt: skip


def made(signature: str, body: str, constants: dict, opset: int = 19) -> ir.Model:
    outputs = re.search(r"=> \((.*)\)", signature).group(1).split(", ")
    kinds = ", ".join(f"float {name}" for name in outputs)
    model = graph(f"{signature.partition('=>')[0]}=> ({kinds})", body, opset=opset, **constants)
    for value in model.graph.outputs:
        value.type = value.shape = None
    infer_shapes(model)
    return model


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_parser_refuses_is_refused_with_its_reason(name: str) -> None:
    reason, signature, body, constants = REFUSED[name]
    found = report(made(signature, body, constants), "tensorrt")
    assert found.refused, found.summary()
    texts = [f"{r.op}: {text}" for r in found.refused for text in r.reasons]
    assert any(re.search(reason, text) for text in texts), texts


TAKEN = {
    "pool of signals": ("(float[2,4,8] x) => (y)", "y = MaxPool<kernel_shape=[2]>(x)", {}),
    "shapes": ("(float[N,4] x) => (y)", "s = Shape(x)  g = Gather(s, i)  y = Expand(x, t)",
               {"i": np.array([0]), "t": np.array([1, 1, 1])}),
    "moves between Q and DQ": ("(float[1,4] x) => (y)",
                               "q = QuantizeLinear(x, s, z)  p = Transpose(q)  y = DequantizeLinear(p, s, z)",
                               {"s": np.array(0.1, np.float32), "z": np.array(0, np.int8)}),
    "int4 weights": ("(float[2,4] x) => (y)", "w = DequantizeLinear<axis=0>(c, s)  y = MatMul(x, w)",
                     {"c": np.ones((4, 2), np.int8), "s": np.ones(4, np.float32)}),
    "casts of uint8 images": ("(uint8[1,3,4,4] x) => (y)", "c = Cast<to=1>(x)  y = Relu(c)", {}),
    "half": ("(float16[1,3,4,4] x) => (y)", "y = Softmax(x)", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", TAKEN)
def test_what_it_takes_is_taken(name: str) -> None:
    found = report(made(*TAKEN[name]), "tensorrt")
    assert not found.refused and len(found.parts) == 1, found.refused


def test_parts_are_runs_of_nodes() -> None:
    model = made("(float[8] x) => (y)", "a = Relu(x)  b = Exp(a)  c, i = Unique(b)  d = Neg(x)  y = Add(c, d)", {})
    found = report(model, "tensorrt")
    assert [len(part.nodes) for part in found.parts] == [2, 2]
    assert [r.op for r in found.refused] == ["Unique"]


def test_bodies_are_read() -> None:
    def model(inner: str) -> ir.Model:
        return ir.from_onnx_text(f"""<ir_version: 9, opset_import: ["" : 18]>
            g (float[4] x, bool c) => (float[4] y) {{
              y = If(c) <then_branch = t () => (float[4] a) {{ a = {inner}(x) }},
                         else_branch = e () => (float[4] b) {{ b = Relu(x) }}> }}""")

    good, bad = model("Neg"), model("BitwiseNot")
    infer_shapes(good)
    assert not report(good, "tensorrt").refused
    refused = report(bad, "tensorrt").refused
    assert [r.op for r in refused] == ["If"] and "BitwiseNot" in " ".join(refused[0].reasons)


def test_the_table_has_its_sources_and_no_operator_twice_without_reason() -> None:
    table = delegate("tensorrt")
    assert table.provider == "TensorrtExecutionProvider" and len(table.sources) >= 3 and table.date >= "2026-11"
    assert table.rules_for("Conv") and not table.rules_for("DynamicQuantizeLinear")
    for op in table.instead:
        assert not table.rules_for(op), op

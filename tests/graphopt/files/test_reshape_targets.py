"""Reshapes to targets that exporters compute from sizes have shapes, before opset 14 too."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from graphopt.model import infer_shapes

CONSTANTS = "<int64[1] rest = {-1}, int64[1] zero = {0}, int64[1] one = {1}, int64 first = {0}, int64[2] hw = {2, 2}>"


def shapes(body: str, opset: int) -> dict[str, list]:
    text = f"""<ir_version: 7, opset_import: ["" : {opset}]>
    agraph (float[n, 6, 2, 2] x) => (y) {CONSTANTS} {{ {body} y = Identity (r) }}"""
    model = ir.from_onnx_text(text)
    infer_shapes(model)
    values = {v.name: v for node in model.graph for v in node.outputs}
    return {
        k: [d if isinstance(d, int) else d.value for d in v.shape] for k, v in values.items() if v.shape is not None
    }


@pytest.mark.parametrize("opset", [9, 11, 13, 17])
@pytest.mark.parametrize("how", ["scalar", "vector", "slice"])
def test_flatten_keeps_the_batch(opset: int, how: str) -> None:
    unsqueeze = "Unsqueeze <axes = [0]> (k)" if opset < 13 else "Unsqueeze (k, zero)"
    cut = "Slice <starts = [0], ends = [1]> (s)" if opset < 10 else "Slice (s, zero, one)"
    batch = {
        "scalar": f"k = Gather (s, first) b = {unsqueeze}",
        "vector": "b = Gather (s, zero)",
        "slice": f"b = {cut}",
    }[how]
    found = shapes(f"s = Shape (x) {batch} t = Concat <axis = 0> (b, rest) f = Reshape (x, t) r = Relu (f)", opset)
    assert found["f"][0] == found["r"][0] == "n"
    if opset < 14:
        assert found["f"] == found["r"] == ["n", 24]


def test_chains_of_reshapes_are_told_from_the_first_on() -> None:
    body = """s = Shape (x) b = Gather (s, zero) c = Gather (s, one) t = Concat <axis = 0> (b, rest)
              f = Reshape (x, t) g = Relu (f) s2 = Shape (g) b2 = Gather (s2, zero)
              t2 = Concat <axis = 0> (b2, c, hw) r = Reshape (g, t2)"""
    assert shapes(body, 11)["r"] == ["n", 6, 2, 2]


def test_products_are_told_and_other_arithmetic_is_unknown() -> None:
    body = """s = Shape (x) b = Gather (s, zero) k = {} t = Concat <axis = 0> (k, rest, one) r = Reshape (x, t)"""
    assert shapes(body.format("Mul (b, b)"), 11)["r"] == ["n*n", None, 1]
    assert shapes(body.format("Add (b, b)"), 11)["r"] == [None, None, 1]


def test_heads_that_were_joined_with_the_batch_are_told_apart_again() -> None:
    body = """s = Shape (x) b = Gather (s, zero) k = Mul (b, hw) k1 = Gather (k, zero)
              t = Concat <axis = 0> (k1, rest, one) f = Reshape (x, t) g = Relu (f)
              t2 = Concat <axis = 0> (b, hw, rest) r = Reshape (g, t2)"""
    found = shapes(body, 13)
    assert found["g"] == ["2*n", 12, 1]
    assert found["r"] == ["n", 2, 2, 6]


def test_axes_without_pads_keep_their_size_beside_computed_ones() -> None:
    body = """s = Shape (x) b = Gather (s, zero) p = Concat <axis = 0> (zero, zero, b, b, zero, zero, one, b)
              r = Pad (x, p)"""
    assert shapes(body, 13)["r"] == ["n", 6, None, None]


def test_a_target_of_unknown_length_is_left_alone() -> None:
    assert "r" not in shapes("s = Shape (x) k = NonZero (s) t = Squeeze <axes = [0]> (k) r = Reshape (x, t)", 11)


@pytest.mark.parametrize(
    ("start", "step", "length"), [("nought", "first_step", "n"), ("one_", "first_step", None), ("nought", "two", None)]
)
def test_a_range_over_a_dimension_is_as_long_as_it(start: str, step: str, length: str | None) -> None:
    body = f"""nought = Constant <value_int = 0> () one_ = Constant <value_int = 1> () two = Constant <value_int = 2> ()
               first_step = Constant <value_int = 1> () s = Shape (x) limit = Gather (s, first)
               k = Range ({start}, limit, {step}) r = Cast <to = 1> (k)"""
    found = shapes(body, 17)
    assert found["k"] == found["r"] == [length]


def test_axes_that_are_scaled_by_one_keep_their_name() -> None:
    found = shapes("s = Shape (x) t = Concat <axis = 0> (one, one, hw) r = Tile (x, t)", 13)
    assert found["r"] == ["n", 6, 4, 4]


@pytest.mark.parametrize(
    ("ends", "cut"), [("s", ["n", 6, 2, 2]), ("Mul (s, two)", [None, 6, 2, 2]), ("Div (s, two)", [None, 3, 1, 1])]
)
def test_a_slice_to_the_sizes_of_a_tensor_takes_all_of_it(ends: str, cut: list) -> None:
    body = """two = Constant <value_ints = [2]> () nought = Constant <value_ints = [0, 0, 0, 0]> () s = Shape (x)
              e = {} r = Slice (x, nought, e)""".format("Identity (s)" if ends == "s" else ends)
    assert shapes(body, 13)["r"] == cut


def test_what_is_told_is_known_behind_it_however_deep() -> None:
    """Halves whose bounds are computed from sizes, put together again, twenty times over."""
    halves = [
        f"""s{k} = Shape (r{k}) c{k} = Gather (s{k}, one) h{k} = Div (c{k}, two) b{k} = Gather (s{k}, zero)
            f{k} = Slice (r{k}, zero, h{k}, one)
            g{k} = Slice (r{k}, h{k}, c{k}, one) j{k} = Concat <axis = 1> (g{k}, f{k})
            t{k} = Concat <axis = 0> (b{k}, c{k}, hw) r{k + 1} = Reshape (j{k}, t{k})"""
        for k in range(20)
    ]
    body = "two = Constant <value_ints = [2]> () r0 = Relu (x)" + " ".join(halves) + " r = Relu (r20)"
    found = shapes(body, 13)
    assert found["f19"] == ["n", 3, 2, 2]
    assert found["r"] == ["n", 6, 2, 2]

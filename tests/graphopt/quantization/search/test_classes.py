"""Classes of layers: what is told apart, how coarsely, and the formats that come out of a mixture."""

from __future__ import annotations

import onnx_ir as ir
from text_graph import graph

from graphopt.quantization.search.classes import BETWEEN, assignment, classes

INT8 = ("int8", "int8-dynamic")


def network() -> ir.Model:
    return graph(
        "(float[1, 8, 16, 16] x) => (float[1, 16] y)",
        """a = Conv <group = 8, pads = [1, 1, 1, 1]> (x, depthwise)
        b = Conv <kernel_shape = [1, 1]> (a, pointwise)
        c = Conv <group = 2, pads = [1, 1, 1, 1]> (b, grouped)
        s = Sigmoid (c)
        r = Add (c, s)
        p = GlobalAveragePool (r)
        f = Flatten (p)
        g = MatMul (f, wide)
        h = MatMul (g, narrow)
        t = Transpose <perm = [1, 0]> (h)
        i = MatMul (t, h)
        y = ReduceMean <axes = [0], keepdims = 1> (i)""",
        depthwise=(8, 1, 3, 3), pointwise=(16, 8, 1, 1), grouped=(16, 8, 3, 3), wide=(16, 300), narrow=(300, 16),
    )  # fmt: skip


def formats() -> dict[str, tuple[str, ...]]:
    return {**dict.fromkeys("abcghi", INT8), "s": ("int8",), "r": ("int8",)}


def test_kernels_sizes_and_kinds_are_told_apart() -> None:
    found = {group.name: group.keys for group in classes(network(), formats(), most=20)}
    assert found == {
        "Conv 3x3 depthwise, up to 4k weights": ("a",),
        "Conv 1x1, up to 4k weights": ("b",),
        "Conv 3x3 in groups, up to 4k weights": ("c",),
        "Sigmoid": ("s",),
        "Add": ("r",),
        "MatMul, 4k to 64k weights": ("g", "h"),
        "MatMul of activations": ("i",),
    }


def test_more_than_are_allowed_are_told_apart_less_finely() -> None:
    six = {group.name: group.keys for group in classes(network(), formats(), most=6)}
    assert six[BETWEEN] == ("s", "r") and six["MatMul"] == ("g", "h") and len(six) == 6
    few = {group.name: group for group in classes(network(), formats(), most=3)}
    assert set(few) == {"Conv", "MatMul", BETWEEN}
    assert few["Conv"].formats == ("float", *INT8) and few[BETWEEN].formats == ("float", "int8")


def test_a_node_that_cannot_be_what_its_class_is_stays_in_float() -> None:
    allowed = {**formats(), "h": ("int8-dynamic",)}
    found = classes(network(), allowed, most=20)
    mixture = {group.name: "int8" if "int8" in group.formats else "float" for group in found}
    chosen = assignment(found, mixture, allowed)
    assert chosen["g"] == "int8" and chosen["h"] == "float" and set(chosen) == set(allowed)


def test_nothing_to_quantise_is_no_class() -> None:
    assert classes(network(), {}) == []


def test_layers_in_bodies_are_in_the_classes_of_the_others() -> None:
    text = """<ir_version: 9, opset_import: ["" : 17]>
    a (bool c, float[1, 4] x, float[4, 4] w) => (float[1, 4] y) {
      y = If (c) <then_branch = t () => (float[1, 4] p) { p = MatMul (x, w) },
                  else_branch = e () => (float[1, 4] q) { q = Identity (x) }>
    }"""
    model = ir.from_onnx_text(text)
    (group,) = classes(model, {"p": ("int8-dynamic",)})
    assert group.name == "MatMul of activations" and group.keys == ("p",)

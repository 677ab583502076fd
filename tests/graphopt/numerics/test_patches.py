"""A convolution is the product of its weight with the patches: equal to ONNX Runtime's, for every geometry."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from graphopt.numerics.patches import Window, channel_columns, patch_chunks, patches


def convolve(x: np.ndarray, w: np.ndarray, window: Window) -> np.ndarray:
    attributes = {"strides": window.strides, "dilations": window.dilations, "group": window.groups}
    attributes |= {"pads": window.pads} if window.auto_pad == "NOTSET" else {"auto_pad": window.auto_pad}
    node = helper.make_node("Conv", ["x", "w"], ["y"], **attributes)
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("x", "w", "y")]
    graph = helper.make_graph([node], "g", values[:2], values[2:])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x, "w": w})[0])


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[int, ...], Window, int]:
    rank = draw(st.integers(1, 3))
    size = st.integers(1, 3)
    auto = draw(st.sampled_from(["NOTSET", "NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]))
    window = Window(
        kernel=tuple(draw(size) for _ in range(rank)),
        strides=tuple(draw(size) for _ in range(rank)),
        # ONNX Runtime takes no dilation together with SAME padding
        dilations=tuple(draw(size) if not auto.startswith("SAME") else 1 for _ in range(rank)),
        pads=tuple(draw(st.integers(0, 2)) for _ in range(2 * rank)) if auto == "NOTSET" else (),
        groups=draw(st.sampled_from([1, 1, 2, 4])),
        auto_pad=auto,
    )
    spatial = tuple(draw(st.integers(3, 8)) for _ in range(rank))
    return (draw(st.integers(1, 3)), 4, *spatial), window, draw(st.integers(0, 99))


@given(cases())
@settings(max_examples=80, deadline=None)
def test_product_with_patches_is_the_convolution(case: tuple[tuple[int, ...], Window, int]) -> None:
    shape, window, seed = case
    try:
        extent = window.output(shape[2:])
    except ValueError:
        assume(False)
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape).astype(np.float32)
    w = rng.normal(size=(8, 4 // window.groups, *window.kernel)).astype(np.float32)
    expected = convolve(x, w, window)
    assert expected.shape[2:] == extent
    per = 8 // window.groups
    rows = [
        w[g * per : (g + 1) * per].reshape(per, -1).astype(np.float64) @ patches(x, window, g)
        for g in range(window.groups)
    ]
    np.testing.assert_allclose(np.concatenate(rows), channel_columns(expected), atol=1e-4)


def test_chunks_are_the_whole() -> None:
    x = np.random.default_rng(0).normal(size=(7, 3, 6, 5)).astype(np.float32)
    window = Window((3, 2), strides=(2, 1), pads=(1, 0, 1, 1))
    whole = patches(x, window)
    parts = list(patch_chunks(x, window, chunk_bytes=2 * whole.nbytes // 7 + 1))
    assert [p.stop - p.start for p, _ in parts] == [2, 2, 2, 1]
    np.testing.assert_array_equal(np.concatenate([c for _, c in parts], axis=1), whole)
    assert sum(p.stop - p.start for p, _ in patch_chunks(x, window, chunk_bytes=1)) == 7


@pytest.mark.parametrize(
    "make",
    [
        lambda: Window((3, 3), strides=(1,)),
        lambda: Window((3,), pads=(1,)),
        lambda: Window((0,)),
        lambda: Window((3,), pads=(-1, 0)),
        lambda: Window((9,)).output((4,)),
        lambda: patches(np.zeros((1, 3, 4)), Window((3, 3))),
        lambda: patches(np.zeros((1, 3, 4)), Window((3,), groups=2)),
        lambda: patches(np.zeros((1, 4, 4)), Window((3,), groups=2), 2),
    ],
)
def test_geometry_that_makes_no_sense_is_refused(make: object) -> None:
    with pytest.raises(ValueError):
        make()  # type: ignore[operator]

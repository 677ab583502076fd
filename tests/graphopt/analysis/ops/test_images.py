"""Operators on images: channels pass, positions do not."""

from __future__ import annotations

import numpy as np
import pytest
from certified import certified, exact
from text_graph import graph


def test_channels_of_an_image_made_of_columns() -> None:
    model = graph(
        "(float[2,3,16] x) => (float[] y)",
        "h = Conv(x, w, b)  i = Col2Im(h, image, block)  r = Relu(i)  y = Conv(r, v)",
        opset=18,
        w=(24, 3, 1),
        b=(24,),
        image=np.array([5, 5]),
        block=np.array([2, 2]),
        v=(2, 6, 1, 1),
    )
    coupling = certified(model)
    assert exact(coupling) == 6
    assert {len(m.indices) for m in coupling.units[0].members if m.parameter == "w"} == {4}


def test_channels_of_a_deformable_convolution() -> None:
    model = graph(
        "(float[2,3,8,8] x) => (float[] y)",
        """h = Conv(x, u)  r = Relu(h)  o = Conv<pads=[1,1,1,1]>(r, t)
           d = DeformConv<pads=[1,1,1,1]>(r, w, o, b)  y = Conv(d, v)""",
        opset=19,
        u=(5, 3, 1, 1),
        t=(18, 5, 3, 3),
        w=(6, 5, 3, 3),
        b=(6,),
        v=(2, 6, 1, 1),
    )
    assert exact(certified(model)) == 5 + 6


@pytest.mark.parametrize(
    ("body", "opset", "parameters"),
    [
        ("r = GridSample(h, k)", 16, {"k": (2, 4, 4, 2)}),
        ("r = RoiAlign<output_height=3, output_width=3>(h, k, i)", 16, {"k": (3, 4), "i": np.array([0, 1, 0])}),
        ("r = MaxRoiPool<pooled_shape=[2,2]>(h, k)", 16, {"k": np.float32([[0, 1, 1, 5, 5], [1, 0, 0, 3, 3]])}),
        ('r = Resize<mode="linear">(h, , k)', 16, {"k": np.float32([1, 1, 2, 2])}),
        ("p, i = MaxPool<kernel_shape=[2,2]>(h)  r = Sigmoid(p)", 16, {}),
        ("r = LpPool<kernel_shape=[2,2]>(h)", 16, {}),
        ("r = GlobalLpPool(h)", 16, {}),
    ],
)
def test_channels_pass(body: str, opset: int, parameters: dict) -> None:
    model = graph(
        "(float[2,3,8,8] x) => (float[] y)",
        f"h = Conv(x, w, b)  {body}  y = Conv(r, v)",
        opset=opset,
        w=(6, 3, 1, 1),
        b=(6,),
        v=(2, 6, 1, 1),
        **parameters,
    )
    assert exact(certified(model)) == 6


def test_a_channel_of_zeros_cannot_be_divided_by_its_deviation() -> None:
    model = graph(
        "(float[2,3,8,8] x) => (float[] y)",
        "h = Conv(x, w)  r = MeanVarianceNormalization(h)  y = Conv(r, v)",
        w=(6, 3, 1, 1),
        v=(2, 6, 1, 1),
    )
    coupling = certified(model)
    assert len(coupling.units) == 6
    assert exact(coupling) == 0


def test_spatial_pads_that_are_computed_leave_the_channels_alone() -> None:
    """A U-Net pads what it enlarged to the size of what it joins it with."""
    model = graph(
        "(float[b,3,h,w] x) => (float[] y)",
        """a = Conv<pads=[1,1,1,1]>(x, wa)  p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(a)
           u = ConvTranspose<strides=[2,2]>(p, wu)
           sa = Shape<start=2>(a)  su = Shape<start=2>(u)  d = Sub(sa, su)  e = Concat<axis=0>(no, d)
           pads = Concat<axis=0>(no, no, e)  q = Pad(u, pads)  j = Concat<axis=1>(a, q)  r = Relu(j)  y = Conv(r, v)""",
        wa=(6, 3, 3, 3),
        wu=(6, 4, 2, 2),
        v=(2, 10, 1, 1),
        no=np.array([0, 0]),
    )
    assert exact(certified(model)) == 6 + 4

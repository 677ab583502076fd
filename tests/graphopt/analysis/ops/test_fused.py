"""Operators that ONNX Runtime fuses: the units of the standard operators they are made of."""

from __future__ import annotations

import numpy as np
import pytest
from certified import certified, exact, reasons
from text_graph import graph

_MICROSOFT = '"com.microsoft" : 1'


@pytest.mark.parametrize(
    "body",
    [
        "a = com.microsoft.Gelu(h)",
        "a = com.microsoft.QuickGelu<alpha=1.3>(h)",
        "a = com.microsoft.FastGelu(h)",
        "a = com.microsoft.FastGelu(h, b)",
        "a = com.microsoft.BiasGelu(h, b)",
        "q = com.microsoft.QuantizeLinear(h, s, z)  a = com.microsoft.DequantizeLinear(q, s, z)",
        "g = MatMul(x, u)  a = Mul(h, g)",
    ],
)
def test_activations_pass_units(body: str) -> None:
    used = {"b": (6,), "u": (8, 6), "s": np.float32(0.1), "z": np.uint8(3)}
    model = graph(
        "(float[2,4,8] x) => (float[] y)",
        f"h = MatMul(x, w)  {body}  y = MatMul(a, v)",
        imports=_MICROSOFT,
        w=(8, 6),
        v=(6, 3),
        **{name: value for name, value in used.items() if f"{name}," in body or f"{name})" in body},
    )
    assert exact(certified(model)) == 6


@pytest.mark.parametrize(
    ("attributes", "units"),
    [
        ('activation="Relu"', 5),
        ('activation="LeakyRelu", activation_params=[0.2]', 5),
        ('activation="Clip", activation_params=[-1.0, 1.5]', 5),
        ('activation="HardSigmoid", activation_params=[0.2, 0.5]', 5),  # a constant, folded into the next bias
        ('activation="Sigmoid"', 5),
        ('activation="Relu", group=1, pads=[1, 1, 1, 1]', 5),
    ],
)
def test_a_fused_convolution_has_the_units_of_a_convolution(attributes: str, units: int) -> None:
    model = graph(
        "(float[2,3,8,8] x) => (float[] y)",
        f"h = com.microsoft.FusedConv<{attributes}>(x, w, b)  y = Conv(h, v, c)",
        imports=_MICROSOFT,
        w=(5, 3, 3, 3),
        b=(5,),
        v=(2, 5, 3, 3),
        c=(2,),
    )
    assert exact(certified(model)) == units


def test_a_fused_sum_ties_its_addends() -> None:
    model = graph(
        "(float[2,3,8,8] x) => (float[] y)",
        """z = Conv(x, u)  h = com.microsoft.FusedConv<activation="Relu">(x, w, b, z)
           y = com.microsoft.FusedConv<activation="Tanh">(h, v, c)""",
        imports=_MICROSOFT,
        w=(5, 3, 3, 3),
        u=(5, 3, 3, 3),
        b=(5,),
        v=(2, 5, 3, 3),
        c=(2,),
    )
    coupling = certified(model)
    assert exact(coupling) == 5
    assert {m.parameter for m in coupling.units[0].members} == {"w", "b", "u", "v"}


def test_constants_fold_into_a_fused_bias_before_the_activation() -> None:
    model = graph(
        "(float[2,8] x) => (float[] y)",
        """h = com.microsoft.FusedGemm<activation="Sigmoid">(x, w, b)
           y = com.microsoft.FusedGemm<activation="Relu", transB=1, alpha=0.5, beta=2.0>(h, v, c)""",
        imports=_MICROSOFT,
        w=(8, 6),
        b=(6,),
        v=(4, 6),
        c=(4,),
    )
    assert exact(certified(model)) == 6


def test_embeddings_that_are_normalised_at_once_stay() -> None:
    model = graph(
        "(int32[2,4] i) => (float[] y)",
        """e, m = com.microsoft.EmbedLayerNormalization(i,, w, p,, g, b)
           h = MatMul(e, u)  r = Relu(h)  y = MatMul(r, v)""",
        imports=_MICROSOFT,
        w=(9, 8),
        p=(5, 8),
        g=(8,),
        b=(8,),
        u=(8, 6),
        v=(6, 3),
    )
    coupling = certified(model)
    assert exact(coupling) == 6
    assert "normalised together" in reasons(coupling, "w")

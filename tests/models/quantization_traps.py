"""Small networks, each with one thing in it on which naive int8 quantisation breaks without a word.

A trap is a function of a seed that gives a model; `samples` draws what it is fed. The networks are no deeper than the
trap needs, so that the noise of the trap and not of ordinary rounding decides, and the trap always matters at the
output: what one layer blows up, the next one scales back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from text_graph import graph

Array = NDArray[Any]
Trap = Callable[[int], ir.Model]

IMAGE = "(float[N,4,12,12] x) => (float[N,10] y)"
TOKENS = "(float[N,12,32] x) => (float[N,12,32] y)"
BIG = 100.0


def samples(model: ir.Model, count: int, seed: int) -> dict[str, Array]:
    """Feeds of `count` samples: normal values, or token numbers for integer inputs."""
    random = np.random.default_rng(seed)
    feeds: dict[str, Array] = {}
    for value in model.graph.inputs:
        shape = (count, *(int(d) for d in list(value.shape or ())[1:] if isinstance(d, int)))
        name = str(value.name)
        if value.dtype == ir.DataType.INT64:
            feeds[name] = random.integers(0, 32, shape)
        else:
            offset, scale = INPUTS.get(str(model.graph.name), (0.0, 1.0))
            feeds[name] = (offset + scale * random.standard_normal(shape)).astype(np.float32)
    return feeds


INPUTS: dict[str, tuple[float, float]] = {"tiny input": (0.0, 1e-6), "offset input": (1000.0, 1.0)}
"""Mean and deviation of inputs by name of the graph, where they are not 0 and 1."""


class _Weights:
    """Weights that keep the variance of what they multiply."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)

    def conv(self, out: int, into: int, kernel: int = 3) -> Array:
        return self._normal((out, into, kernel, kernel), into * kernel * kernel)

    def matrix(self, rows: int, columns: int) -> Array:
        return self._normal((rows, columns), rows)

    def vector(self, size: int, deviation: float = 0.1) -> Array:
        return (deviation * self._random.standard_normal(size)).astype(np.float32)

    def _normal(self, shape: tuple[int, ...], fan_in: int) -> Array:
        return (self._random.standard_normal(shape) * np.sqrt(2 / fan_in)).astype(np.float32)


def _scaled(weight: Array, axis: int, channels: slice | list[int], factor: float) -> Array:
    """A copy with some channels of an axis multiplied."""
    copy = weight.copy()
    np.moveaxis(copy, axis, 0)[channels] *= factor
    return copy


def _convolutions(
    seed: int, change: Callable[[dict[str, Array]], None], body: str = "", signature: str = IMAGE
) -> ir.Model:
    """Two convolutions and a Gemm; `change` plants the trap in their weights, `body` replaces the nodes."""
    make = _Weights(seed)
    parameters: dict[str, Array] = {
        "w1": make.conv(16, 4), "b1": make.vector(16), "w2": make.conv(16, 16), "b2": make.vector(16),
        "w3": make.matrix(16, 10), "b3": make.vector(10),
    }  # fmt: skip
    change(parameters)
    return graph(IMAGE, body or CONVOLUTIONS, **parameters)


CONVOLUTIONS = """
    c1 = Conv<pads=[1,1,1,1]>(x, w1, b1)
    r1 = Relu(c1)
    c2 = Conv<pads=[1,1,1,1]>(r1, w2, b2)
    r2 = Relu(c2)
    g = GlobalAveragePool(r2)
    f = Flatten(g)
    y = Gemm(f, w3, b3)
"""


def _attention(
    seed: int, change: Callable[[dict[str, Array]], None], body: str = "", signature: str = TOKENS
) -> ir.Model:
    """A transformer block: norm, attention of one head, residual, norm, two matrices, residual."""
    make = _Weights(seed)
    parameters: dict[str, Array] = {
        "g1": 1 + make.vector(32), "h1": make.vector(32), "g2": 1 + make.vector(32), "h2": make.vector(32),
        "wq": make.matrix(32, 32) * np.float32(0.7), "wk": make.matrix(32, 32) * np.float32(0.7),
        "wv": make.matrix(32, 32), "wo": make.matrix(32, 32) * np.float32(0.5),
        "wu": make.matrix(32, 64), "bu": make.vector(64), "wd": make.matrix(64, 32) * np.float32(0.5),
        "bd": make.vector(32),
        "scale": np.array(32**-0.5, np.float32),
    }  # fmt: skip
    change(parameters)
    return graph(TOKENS, body or ATTENTION, **parameters)


ATTENTION = """
    n1 = LayerNormalization<axis=-1>(x, g1, h1)
    q = MatMul(n1, wq)
    k = MatMul(n1, wk)
    v = MatMul(n1, wv)
    kt = Transpose<perm=[0,2,1]>(k)
    raw = MatMul(q, kt)
    scores = Mul(raw, scale)
    p = Softmax<axis=-1>(scores)
    a = MatMul(p, v)
    o = MatMul(a, wo)
    s = Add(x, o)
    n2 = LayerNormalization<axis=-1>(s, g2, h2)
    u = MatMul(n2, wu)
    ub = Add(u, bu)
    act = Relu(ub)
    d = MatMul(act, wd)
    db = Add(d, bd)
    y = Add(s, db)
"""


def plain_cnn(seed: int) -> ir.Model:
    """No trap."""
    return _convolutions(seed, lambda p: None)


def plain_attention(seed: int) -> ir.Model:
    """No trap."""
    return _attention(seed, lambda p: None)


def outlier_channel_cnn(seed: int) -> ir.Model:
    """One channel of 100 times the others, which counts no more than they do."""

    def change(p: dict[str, Array]) -> None:
        p.update(
            w1=_scaled(p["w1"], 0, [3], BIG), b1=_scaled(p["b1"], 0, [3], BIG), w2=_scaled(p["w2"], 1, [3], 1 / BIG)
        )

    return _convolutions(seed, change)


def outlier_channel_attention(seed: int) -> ir.Model:
    """One channel of 100 times the others behind both norms."""

    def change(p: dict[str, Array]) -> None:
        for gain, offset, readers in (("g1", "h1", ("wq", "wk", "wv")), ("g2", "h2", ("wu",))):
            p[gain], p[offset] = _scaled(p[gain], 0, [5], BIG), _scaled(p[offset], 0, [5], BIG)
            p.update({name: _scaled(p[name], 0, [5], 1 / BIG) for name in readers})

    return _attention(seed, change)


def outlier_unit_attention(seed: int) -> ir.Model:
    """One unit of 100 times the others between the two matrices."""

    def change(p: dict[str, Array]) -> None:
        p.update(
            wu=_scaled(p["wu"], 1, [7], BIG), bu=_scaled(p["bu"], 0, [7], BIG), wd=_scaled(p["wd"], 0, [7], 1 / BIG)
        )

    return _attention(seed, change)


def outlier_weight_cnn(seed: int) -> ir.Model:
    """In each filter one weight of 100 times the others, on a channel that is as much smaller."""

    def change(p: dict[str, Array]) -> None:
        p.update(
            w1=_scaled(p["w1"], 0, [3], 1 / BIG), b1=_scaled(p["b1"], 0, [3], 1 / BIG), w2=_scaled(p["w2"], 1, [3], BIG)
        )

    return _convolutions(seed, change)


def dead_layer_cnn(seed: int) -> ir.Model:
    """A branch of zeros, and a convolution whose Relu never opens."""

    def change(p: dict[str, Array]) -> None:
        p.update(wz=np.zeros_like(p["w2"]), bz=np.zeros_like(p["b2"]), wn=p["w2"] * np.float32(0.01), bn=p["b2"] - 50)

    return _convolutions(
        seed, change, CONVOLUTIONS.replace(
            "r2 = Relu(c2)",
            """z = Conv<pads=[1,1,1,1]>(r1, wz, bz)
            zr = Relu(z)
            n = Conv<pads=[1,1,1,1]>(r1, wn, bn)
            nr = Relu(n)
            c2z = Add(c2, zr)
            c2n = Add(c2z, nr)
            r2 = Relu(c2n)""",
        ),
    )  # fmt: skip


def dead_layer_attention(seed: int) -> ir.Model:
    """The attention gives zeros: the matrix behind its values is zero."""
    return _attention(seed, lambda p: p.update(wv=np.zeros_like(p["wv"])))


GATED = CONVOLUTIONS.replace(
    "r2 = Relu(c2)",
    """t = Conv<pads=[1,1,1,1]>(r1, wt, bt)
    gate = Sigmoid(t)
    r2 = Mul(c2, gate)""",
)


def sigmoid_tail_cnn(seed: int) -> ir.Model:
    """A gate that is open or shut by far in some channels and undecided in the others."""

    def change(p: dict[str, Array]) -> None:
        wt = _Weights(seed + 1).conv(16, 16)
        p.update(wt=_scaled(wt, 0, slice(0, 4), BIG), bt=np.where(np.arange(16) < 4, -200.0, 0).astype(np.float32))

    return _convolutions(seed, change, GATED)


def sigmoid_tail_attention(seed: int) -> ir.Model:
    """A gate on the feed-forward part, with the same tail."""

    def change(p: dict[str, Array]) -> None:
        wt = _Weights(seed + 1).matrix(32, 64)
        p.update(wt=_scaled(wt, 1, slice(0, 8), BIG), wd=p["wd"] * np.float32(0.5))

    body = ATTENTION.replace("act = Relu(ub)", "t = MatMul(n2, wt)  gate = Sigmoid(t)  act = Mul(ub, gate)")
    return _attention(seed, change, body)


def tiny_scale_cnn(seed: int) -> ir.Model:
    """A tensor of the order of 1e-6 between two layers."""
    small = np.float32(1e-6)
    return _convolutions(seed, lambda p: p.update(w1=p["w1"] * small, b1=p["b1"] * small, w2=p["w2"] / small))


def tiny_scale_attention(seed: int) -> ir.Model:
    """The same between norm and attention, and between the two matrices."""
    small = np.float32(1e-6)

    def change(p: dict[str, Array]) -> None:
        p.update(g1=p["g1"] * small, h1=p["h1"] * small, wu=p["wu"] * small, bu=p["bu"] * small, wd=p["wd"] / small)
        p.update({name: p[name] / small for name in ("wq", "wk", "wv")})

    return _attention(seed, change)


def tiny_input_cnn(seed: int) -> ir.Model:
    """Inputs of the order of 1e-6."""
    model = _convolutions(seed, lambda p: p.update(w1=p["w1"] * np.float32(1e6)))
    model.graph.name = "tiny input"
    return model


def offset_input_cnn(seed: int) -> ir.Model:
    """Inputs that vary by 1 around 1000, under filters that take no notice of the 1000."""

    def change(p: dict[str, Array]) -> None:
        p.update(w1=p["w1"] - p["w1"].mean(axis=(1, 2, 3), keepdims=True))

    model = _convolutions(seed, change, CONVOLUTIONS.replace("<pads=[1,1,1,1]>(x", "(x"))
    model.graph.name = "offset input"
    return model


def residual_cnn(seed: int) -> ir.Model:
    """A sum of terms whose ranges are 1000 apart, in channels that are scaled back behind it."""

    def change(p: dict[str, Array]) -> None:
        ws, big = _Weights(seed + 1).conv(16, 16), np.float32(1000)
        p.update(ws=_scaled(ws, 0, slice(0, 8), big), bs=np.zeros(16, np.float32))
        p.update(w2=_scaled(p["w2"], 0, slice(0, 8), 0.0), b2=p["b2"])
        p.update(w3=_scaled(p["w3"], 0, slice(0, 8), 1 / big))

    branch = "cs = Conv<pads=[1,1,1,1]>(r1, ws, bs)  sum = Add(c2, cs)  r2 = Relu(sum)"
    return _convolutions(seed, change, CONVOLUTIONS.replace("r2 = Relu(c2)", branch))


def residual_attention(seed: int) -> ir.Model:
    """The residual stream has one channel that stands at 1000, and norms that make up for it."""

    def change(p: dict[str, Array]) -> None:
        p.update(huge=1000 * np.eye(1, 32, 9, dtype=np.float32)[0])
        for gain in ("g1", "g2"):
            p[gain] = _scaled(p[gain] * np.float32(1000 / 32**0.5), 0, [9], 1e-3)

    body = ATTENTION.replace("(x, g1", "(stream, g1").replace("Add(x, o)", "Add(stream, o)")
    body = "stream = Add(x, huge)" + body.replace("y = Add(s, db)", "e = Add(s, db)  y = Sub(e, huge)")
    return _attention(seed, change, body)


def tiny_norm_cnn(seed: int) -> ir.Model:
    """A BatchNormalization of tiny gain was folded: filters of 1e-8 under biases of ordinary size."""

    def change(p: dict[str, Array]) -> None:
        p.update(w1=_scaled(p["w1"], 0, slice(0, 6), 1e-8), b1=p["b1"] + np.float32(0.5))

    return _convolutions(seed, change)


def masked_softmax(seed: int) -> ir.Model:
    """Scores that a mask lowers by 1e9."""
    mask = np.where(np.tri(12, dtype=bool), 0, -1e9).astype(np.float32)[None]
    body = ATTENTION.replace("p = Softmax<axis=-1>(scores)", "masked = Add(scores, mask)  p = Softmax<axis=-1>(masked)")
    return _attention(seed, lambda p: p.update(mask=mask), body)


def masked_softmax_moved(seed: int) -> ir.Model:
    """Scores that a mask lowers by 1e9 before data movement and a matrix product that ignores what is masked."""
    mask = np.where(np.arange(12) < 10, 0, -1e9).astype(np.float32)
    body = ATTENTION.replace(
        "p = Softmax<axis=-1>(scores)",
        """masked = Add(scores, mask)
        turned = Transpose<perm=[0,2,1]>(masked)
        part = Slice(turned, first, last, axis)
        kept = MatMul(mix, part)
        wide = Transpose<perm=[0,2,1]>(kept)
        p = Softmax<axis=-1>(wide)""",
    )

    def change(p: dict[str, Array]) -> None:
        p.update(mask=mask, first=np.array([0]), last=np.array([10]), axis=np.array([1]))
        p.update(mix=_Weights(seed + 1).matrix(12, 10))

    return _attention(seed, change, body)


def sharp_softmax(seed: int) -> ir.Model:
    """Scores so large that one per cent of them turns the attention around."""
    return _attention(seed, lambda p: p.update(scale=np.array(4.0, np.float32)))


def huge_bias_logits_cnn(seed: int) -> ir.Model:
    """A bias that dwarfs what the last layer computes, taken away by a softmax."""
    body = CONVOLUTIONS.replace("y = Gemm(f, w3, b3)", "l = Gemm(f, w3, b3)  y = Softmax(l)")
    return _convolutions(seed, lambda p: p.update(b3=p["b3"] + 1e4), body)


def huge_bias_inside_cnn(seed: int) -> ir.Model:
    """A bias of 1000 that the next layer's filters take no notice of."""

    def change(p: dict[str, Array]) -> None:
        p.update(b1=p["b1"] + 1000, w2=p["w2"] - p["w2"].mean(axis=(1, 2, 3), keepdims=True))

    return _convolutions(seed, change, CONVOLUTIONS.replace("<pads=[1,1,1,1]>(r1", "(r1"))


def giant_row_embedding(seed: int) -> ir.Model:
    """A table of which one row is 1000 times the others; the layer behind reads it without a norm."""
    table = _scaled(_Weights(seed).matrix(32, 32) * np.float32(4), 0, [17], 1000.0)
    make = _Weights(seed + 1)
    return graph(
        "(int64[N,12] x) => (float[N,12,16] y)",
        """e = Gather<axis=0>(table, x)
        h = MatMul(e, w1)
        n = LayerNormalization<axis=-1>(h, g, b)
        y = MatMul(n, w2)""",
        table=table, w1=make.matrix(32, 32), g=1 + make.vector(32), b=make.vector(32), w2=make.matrix(32, 16),
    )  # fmt: skip


def depthwise_spread_cnn(seed: int) -> ir.Model:
    """Depthwise filters whose sizes lie 1e4 apart, scaled back by the pointwise ones."""
    spread = np.logspace(-2, 2, 16).astype(np.float32)

    def change(p: dict[str, Array]) -> None:
        wd = _Weights(seed + 1).conv(16, 1)
        p.update(wd=wd * spread[:, None, None, None], bd=p["b1"] * spread, wp=_Weights(seed + 2).conv(16, 16, 1))
        p.update(wp=p["wp"] / spread[:, None, None])

    body = CONVOLUTIONS.replace(
        "c2 = Conv<pads=[1,1,1,1]>(r1, w2, b2)",
        "dw = Conv<pads=[1,1,1,1], group=16>(r1, wd, bd)  dr = Relu(dw)  c2 = Conv(dr, wp, b2)",
    )
    return _convolutions(seed, change, body)


def concat_cnn(seed: int) -> ir.Model:
    """Branches whose ranges are 1000 apart, joined, and scaled back by the layer that reads both."""
    big = np.float32(1000)

    def change(p: dict[str, Array]) -> None:
        p.update(wa=_Weights(seed + 1).conv(8, 16), wb=_Weights(seed + 2).conv(8, 16) * big)
        p.update(w2=_scaled(p["w2"], 1, slice(8, 16), 1 / big))

    body = CONVOLUTIONS.replace(
        "c2 = Conv<pads=[1,1,1,1]>(r1, w2, b2)",
        """ca = Conv<pads=[1,1,1,1]>(r1, wa)
        cb = Conv<pads=[1,1,1,1]>(r1, wb)
        joined = Concat<axis=1>(ca, cb)
        open = Relu(joined)
        c2 = Conv<pads=[1,1,1,1]>(open, w2, b2)""",
    )
    return _convolutions(seed, change, body)


def shared_tensor_cnn(seed: int) -> ir.Model:
    """One layer needs the large channel of a tensor, the other only the small ones."""

    def change(p: dict[str, Array]) -> None:
        p.update(w1=_scaled(p["w1"], 0, [3], BIG), wa=_scaled(_Weights(seed + 1).conv(16, 16), 1, [3], 0.0))
        wb = np.zeros_like(p["w2"])
        wb[:, 3] = p["w2"][:, 3] / BIG
        p.update(w2=wb)

    return _convolutions(
        seed, change,
        CONVOLUTIONS.replace("r2 = Relu(c2)", "ca = Conv<pads=[1,1,1,1]>(r1, wa)  sum = Add(c2, ca)  r2 = Relu(sum)"),
    )  # fmt: skip


def shared_tensor_attention(seed: int) -> ir.Model:
    """Queries and keys read a channel of 100, values do not."""

    def change(p: dict[str, Array]) -> None:
        p.update(g1=_scaled(p["g1"], 0, [5], BIG), h1=_scaled(p["h1"], 0, [5], BIG), wv=_scaled(p["wv"], 0, [5], 0.0))
        p.update({name: _scaled(p[name], 0, [5], 1 / BIG) for name in ("wq", "wk")})

    return _attention(seed, change)


def power_spectrum_cnn(seed: int) -> ir.Model:
    """Powers over many decades under a logarithm: small ones count as much as large ones."""
    spread = np.logspace(-2.5, 0, 16).astype(np.float32)

    def change(p: dict[str, Array]) -> None:
        p.update(w1=p["w1"] * spread[:, None, None, None], b1=0 * p["b1"], floor=np.array(1e-12, np.float32))

    body = CONVOLUTIONS.replace("r1 = Relu(c1)", "sq = Mul(c1, c1)  fl = Add(sq, floor)  r1 = Log(fl)")
    return _convolutions(seed, change, body)


def reciprocal_cnn(seed: int) -> ir.Model:
    """A division by what a layer computes, now and then by little."""

    def change(p: dict[str, Array]) -> None:
        p.update(wt=_Weights(seed + 1).conv(16, 16) * np.float32(0.2), bt=np.zeros(16, np.float32))
        p.update(least=np.array(0.01, np.float32))

    body = CONVOLUTIONS.replace(
        "r2 = Relu(c2)",
        "t = Conv<pads=[1,1,1,1]>(r1, wt, bt)  ta = Mul(t, t)  tb = Add(ta, least)  r2 = Div(c2, tb)",
    )
    return _convolutions(seed, change, body)


PLAIN: tuple[Trap, ...] = (plain_cnn, plain_attention)

TRAPS: tuple[Trap, ...] = (
    outlier_channel_cnn, outlier_channel_attention, outlier_unit_attention, outlier_weight_cnn,
    dead_layer_cnn, dead_layer_attention, sigmoid_tail_cnn, sigmoid_tail_attention,
    tiny_scale_cnn, tiny_scale_attention, tiny_input_cnn, offset_input_cnn,
    residual_cnn, residual_attention, tiny_norm_cnn, masked_softmax, masked_softmax_moved, sharp_softmax,
    huge_bias_logits_cnn, huge_bias_inside_cnn, giant_row_embedding, depthwise_spread_cnn, concat_cnn,
    shared_tensor_cnn, shared_tensor_attention, power_spectrum_cnn, reciprocal_cnn,
)  # fmt: skip

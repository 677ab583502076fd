"""Einsum and fused products: equations parsed, units counted by hand, certificates."""

from __future__ import annotations

import numpy as np
import pytest
from certified import certified, exact, reasons
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from text_graph import graph

from graphopt.analysis.cost import model_stats
from graphopt.analysis.ops.contraction import Terms, parse_equation


@pytest.mark.parametrize(
    ("equation", "ranks", "operands", "result"),
    [
        ("ij, jk -> ik", (2, 2), ("ij", "jk"), "ik"),
        ("ij,jk", (2, 2), ("ij", "jk"), "ik"),
        ("ba", (2,), ("ba",), "ab"),
        ("ii->i", (2,), ("ii",), "i"),
        ("ii", (2,), ("ii",), ""),
        ("...ij,...jk->...ik", (4, 3), (".0 .1 i j", ".1 j k"), ".0 .1 i k"),
        ("i...,i", (3, 1), ("i .0 .1", "i"), ".0 .1"),
    ],
)
def test_equations_are_read(equation: str, ranks: tuple, operands: tuple, result: str) -> None:
    def indices(text: str) -> tuple[str, ...]:
        return tuple(text.split()) if " " in text else tuple(text)

    assert parse_equation(equation, ranks) == Terms(tuple(indices(o) for o in operands), indices(result))


@pytest.mark.parametrize(("equation", "ranks"), [("ij,jk->ik", (2,)), ("ij->ji", (3,)), ("ijk->i", (2,))])
def test_equations_that_do_not_fit_are_refused(equation: str, ranks: tuple) -> None:
    assert isinstance(parse_equation(equation, ranks), str)


def test_a_projection_by_einsum_has_the_units_of_a_matrix_product() -> None:
    model = graph(
        "(float[b,5,8] x) => (float[b,5,3] y)",
        """h = Einsum<equation="bsi,ij->bsj">(x, w)  a = Add(h, c)  r = Relu(a)
           y = Einsum<equation="bsj,kj->bsk">(r, v)""",
        w=(8, 6),
        c=(6,),
        v=(3, 6),
    )
    coupling = certified(model)
    assert exact(coupling) == 6
    assert {(m.parameter, m.axis, m.role) for m in coupling.units[0].members} == {
        ("w", 1, "producer"),
        ("c", 0, "producer"),
        ("v", 1, "consumer"),
    }
    assert model_stats(model).macs == 5 * (8 * 6 + 6 * 3)


def test_scores_of_heads_by_einsum() -> None:
    model = graph(
        "(float[2,5,8] x) => (float[2,5,3] y)",
        """q = Einsum<equation="bsi,ihd->bshd">(x, wq)  k = Einsum<equation="bsi,ihd->bshd">(x, wk)
           v = Einsum<equation="bsi,ihd->bshd">(x, wv)  s = Einsum<equation="bqhd,bkhd->bhqk">(q, k)
           p = Softmax<axis=-1>(s)  c = Einsum<equation="bhqk,bkhd->bqhd">(p, v)
           y = Einsum<equation="bqhd,hdo->bqo">(c, wo)""",
        wq=(8, 3, 4),
        wk=(8, 3, 4),
        wv=(8, 3, 6),
        wo=(3, 6, 3),
    )
    assert exact(certified(model)) == 3 + 4 + 6  # heads, positions of q and k, positions of v


def test_a_summed_axis_must_be_zero_where_it_dies() -> None:
    body = 'h = MatMul(x, w)  s = {}(h)  y = Einsum<equation="ij->i">(s)'
    signature = "(float[4,8] x) => (float[4] y)"
    assert exact(certified(graph(signature, body.format("Relu"), w=(8, 6)))) == 6
    assert exact(certified(graph(signature, body.format("Sigmoid"), w=(8, 6)))) == 0


def test_an_axis_of_one_position_is_repeated() -> None:
    model = graph(
        "(float[4,8] x) => (float[4,3] y)",
        'h = MatMul(x, w)  g = Einsum<equation="ij,ij->ij">(h, s)  y = MatMul(g, v)',
        w=(8, 6),
        s=(1, 6),
        v=(6, 3),
    )
    assert exact(certified(model)) == 6


@pytest.mark.parametrize(
    ("attributes", "left", "right"),
    [
        ("transA=0", (2, 5, 7), (2, 7, 6)),
        ("transA=1, alpha=0.5", (2, 7, 5), (2, 7, 6)),
        ("transB=1", (2, 5, 7), (6, 7)),
        ("transA=1, transB=1", (2, 7, 5), (2, 6, 7)),
        ("transBatchA=1, transBatchB=1", (5, 2, 7), (7, 2, 6)),
        ("transBatchA=1, transBatchB=1, transA=1, transB=1", (7, 2, 5), (6, 2, 7)),
    ],
)
def test_fused_products_follow_their_transposes(attributes: str, left: tuple, right: tuple) -> None:
    """Every axis of both operands is made by a factor of its own, so that every axis has units."""
    named = {"a": left, "b": right}
    inputs, body = [], []
    for name, shape in named.items():
        inputs.append(f"float[{','.join(map(str, shape))}] {name}")
        body += [f"{name}s = Mul({name}, {name}w)"]
    model = graph(
        f"({', '.join(inputs)}) => (float[] y)",
        "  ".join(body) + f"  p = com.microsoft.FusedMatMul<{attributes}>(as, bs)  y = ReduceSum<keepdims=0>(p, axes)",
        imports='"com.microsoft" : 1',
        aw=left,
        bw=right,
        axes=np.array([0, 1, 2]),
    )
    coupling = certified(model)
    # Rows, columns and the inner axis; inputs of the graph freeze what they span, so it is told by the reasons.
    assert "no rule" not in reasons(coupling, "aw") + reasons(coupling, "bw")


_LETTERS = st.sampled_from("abcd")


@st.composite
def _equations(draw: st.DrawFn) -> tuple[str, str, str]:
    left = "".join(draw(st.lists(_LETTERS, min_size=1, max_size=3)))
    right = "".join(draw(st.lists(_LETTERS, min_size=1, max_size=3)))
    result = "".join(draw(st.permutations(sorted(set(left + right)))))
    return left, right, result[: draw(st.integers(0, len(result)))]


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(_equations(), st.booleans())
def test_random_equations_hold_their_certificates(terms: tuple[str, str, str], computed: bool) -> None:
    """Both operands are sums over an input, so that every axis of theirs is an axis of a parameter with units."""
    left, right, result = terms
    sizes = {"a": 3, "b": 4, "c": 5, "d": 6}
    made = {"l": left, "r": right} if computed else {"l": left}
    body = [f"{k} = Relu({k}0)" for k in made]
    parameters = {}
    for name, letters in {"l": left, "r": right}.items():
        shape = tuple(sizes[c] for c in letters)
        if name in made:
            free = "".join(chr(ord("m") + k) for k in range(len(letters)))
            body.insert(0, f'{name}0 = Einsum<equation="z,z{free}->{free}">(x, w{name})')
            parameters[f"w{name}"] = (2, *shape)
        else:
            parameters[name] = shape
    ends = "".join(chr(ord("m") + k) for k in range(len(result)))
    body.append(f'e = Einsum<equation="{left},{right}->{result}">(l, r)')
    body.append(f'y = Einsum<equation="{ends},{ends}->">(e, o)')
    parameters["o"] = tuple(sizes[c] for c in result)
    certified(graph("(float[2] x) => (float[] y)", "  ".join(body), **parameters), seeds=2)

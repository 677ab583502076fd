"""Weights wherever they stand: in Constant nodes, among the inputs, in bodies, shared, tied. Cut, saved and loaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from text_graph import graph

import graphopt
from graphopt.analysis.certificate import certify, choose, zero_units
from graphopt.analysis.remove import remove_units
from graphopt.analysis.units import Coupling, analyse
from graphopt.base import Context
from graphopt.model import infer_shapes, load, save
from graphopt.passes.shrink import Shrink
from graphopt.progress import Silent
from graphopt.target import Target
from graphopt.verify import compare, random_feeds

MLP = "(float[n,3] x) => (float[n,2] y)"


def proved(model: ir.Model, folder: Path) -> Coupling:
    """The analysis of a model; its certificate holds, and what is cut is the same after it was saved and loaded."""
    coupling = analyse(model)
    dead = choose(coupling, 0.5, 1)
    assert dead
    certificate = certify(model, coupling, dead)
    assert certificate.holds
    assert certificate.control is not None and certificate.control > 1e-3
    zeroed, pruned = model.clone(), model.clone()
    zero_units(zeroed, coupling, dead)
    remove_units(pruned, coupling, dead)
    save(pruned, folder / "pruned.onnx")
    again = load(folder / "pruned.onnx")
    assert compare(zeroed, again, random_feeds(zeroed, 0)).worst_relative < 1e-5
    assert len(analyse(again).units) == len(coupling.units) - len(dead)
    return coupling


def members(coupling: Coupling) -> set[tuple[str, int]]:
    """What the first unit consists of."""
    return {(m.parameter, m.axis) for m in coupling.units[0].members}


def test_constant_nodes(tmp_path: Path) -> None:
    """A matrix, a vector of floats and a shape, each written as exporters do."""
    values = ", ".join(f"{v:.3f}" for v in np.linspace(-1, 1, 5))
    model = graph(
        MLP,
        f"b = Constant<value_floats = [{values}]>()  s = Constant<value_ints = [0, 1, 5]>()  t = Constant<value_ints = [0, 5]>()"  # noqa: E501
        "  h = MatMul(x, w1)  a = Add(h, b)  r = Relu(a)  v = Reshape(r, s)  u = Reshape(v, t)  y = MatMul(u, w2)",
        w1=(3, 5),
        w2=(5, 2),
    )
    for name in ("w1", "w2"):
        value = model.graph.initializers.pop(name)
        node = ir.node("Constant", [], attributes={"value": value.const_value}, name=f"{name}_node")
        model.graph.insert_before(model.graph[0], node)
        value.replace_all_uses_with(node.outputs[0])
        node.outputs[0].name = name
    infer_shapes(model)
    coupling = proved(model, tmp_path)
    assert len(coupling.units) == 5
    assert members(coupling) == {("w1", 1), ("b", 0), ("w2", 0)}


def overridable() -> ir.Model:
    """Weights that a caller may override, as models of IR version 3 list them all."""
    model = graph(MLP, "h = MatMul(x, w1)  r = Relu(h)  y = MatMul(r, w2)", w1=(3, 5), w2=(5, 2))
    model.graph.inputs.extend(model.graph.initializers.values())
    return model


def test_initializers_among_the_inputs_change_with_their_declared_shape(tmp_path: Path) -> None:
    model = overridable()
    coupling = proved(model, tmp_path)
    assert len(coupling.units) == 5
    remove_units(model, coupling, {1})
    declared = next(v for v in model.graph.inputs if v.name == "w1")
    assert declared.shape == ir.Shape([3, 4])
    assert declared.const_value is not None and tuple(declared.const_value.shape.numpy()) == (3, 4)


def test_shrink_makes_constants_of_what_it_relies_on() -> None:
    """A caller who overrides the zeros would get a live unit back: so none can be overridden any more."""
    model = overridable()
    zero_units(model, analyse(model), {2})
    assert graphopt.inspect(model).units.units == 5
    assert len(model.graph.inputs) == 3
    result = Shrink().run(model, Context(Target("cpu", "ort"), None, None, 0, 1, Silent()))
    assert result.changed
    assert any("could override" in note for note in result.notes)
    assert [v.name for v in model.graph.inputs] == ["x"]


def test_a_matrix_that_a_body_shares_with_the_graph_around_it_is_tied(tmp_path: Path) -> None:
    model = graph(
        "(float[n,6] x, bool c) => (float[n,2] y)",
        """h = MatMul(x, w)  r = Relu(h)
           k = If (c) <then_branch = t () => (float[n,6] u) { u = MatMul(r, w) },\
                       else_branch = e () => (float[n,6] v) { v = MatMul(r, w3) }>
           y = MatMul(k, w2)""",
        w=(6, 6),
        w3=(6, 6),
        w2=(6, 2),
    )
    coupling = analyse(model)
    assert not coupling.units  # x meets the rows of w, and its columns are the rows it meets inside
    free = graph(
        "(float[n,3] x, bool c) => (float[n,2] y)",
        """h0 = MatMul(x, w0)  h = MatMul(h0, w)  r = Relu(h)
           k = If (c) <then_branch = t () => (float[n,6] u) { u = MatMul(r, w) },\
                       else_branch = e () => (float[n,6] v) { v = MatMul(r, w3) }>
           y = MatMul(k, w2)""",
        w0=(3, 6),
        w=(6, 6),
        w3=(6, 6),
        w2=(6, 2),
    )
    coupling = proved(free, tmp_path)
    assert len(coupling.units) == 6
    assert members(coupling) == {("w0", 1), ("w", 0), ("w", 1), ("w3", 0), ("w3", 1), ("w2", 0)}


def test_a_vector_that_a_body_shares_is_copied_where_it_is_cut(tmp_path: Path) -> None:
    model = graph(
        "(float[n,3] x, bool c) => (float[n,2] y)",
        """h0 = MatMul(x, w1)  h = Add(h0, b)  g0 = MatMul(h, w2)
           g = If (c) <then_branch = t () => (float[n,8] u) { u = Add(g0, b) },\
                       else_branch = e () => (float[n,8] v) { v = Sub(g0, b) }>
           y = MatMul(g, w3)""",
        w1=(3, 8),
        b=(8,),
        w2=(8, 8),
        w3=(8, 2),
    )
    coupling = proved(model, tmp_path)
    assert len(coupling.units) == 16
    remove_units(model, coupling, {coupling.axis_units("h", 1)[0][0]})
    assert model.graph.initializers["b"].const_value is not None
    assert tuple(model.graph.initializers["b"].const_value.shape.numpy()) == (8,)


@pytest.mark.parametrize("head", ["t = Transpose(e)  y = MatMul(r, t)", "f = Relu(r)  y = Gemm<transB=1>(f, e)"])
def test_tied_embeddings_lose_columns_on_both_sides(head: str, tmp_path: Path) -> None:
    """The table is read by Gather and, transposed, by the last layer: its width is one axis, its words stay."""
    model = graph(
        "(int64[7] words) => (float[7,9] y)",
        f"p = Gather(e, words)  h = MatMul(p, w1)  a = Relu(h)  m = MatMul(a, w2)  r = Add(p, m)  {head}",
        e=(9, 6),
        w1=(6, 5),
        w2=(5, 6),
    )
    coupling = proved(model, tmp_path)
    assert len(coupling.units) == 6 + 5
    assert members(coupling) == {("e", 1), ("w1", 0), ("w2", 1)}
    remove_units(model, coupling, {1, 2})
    table = model.graph.initializers["e"].const_value
    assert table is not None and tuple(table.shape.numpy()) == (9, 4)
    assert sum("e" in name for name in model.graph.initializers) == 1  # still one table


def test_parts_of_a_vector_that_are_taken_elsewhere_are_no_units() -> None:
    """Two slices of one bias, each for a layer of its own: 3 + 3 units, not 6 + 6."""
    model = graph(
        "(float[n,3] x) => (float[n,2] y)",
        """b1 = Slice(b, zero, three)  b2 = Slice(b, three, six)
           h = Gemm(x, w1, b1)  g = Gemm(h, w2, b2)  y = MatMul(g, w3)""",
        b=(6,),
        w1=(3, 3),
        w2=(3, 3),
        w3=(3, 2),
        zero=np.array([0]),
        three=np.array([3]),
        six=np.array([6]),
    )
    assert len(analyse(model).units) == 6

"""Functions inlined, names made distinct: the function of the model and the names of its parameters stay."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from text_graph import graph

import graphopt
from graphopt.analysis.certificate import certify, choose, zero_units
from graphopt.analysis.units import analyse
from graphopt.base import Context
from graphopt.errors import ModelError
from graphopt.model import infer_shapes
from graphopt.passes.shrink import Shrink
from graphopt.progress import Silent
from graphopt.rewriting.prepare import distinct_names, inline_functions, prepare
from graphopt.target import Target
from graphopt.verify import compare, random_feeds

MLP = """
<ir_version: 10, opset_import: ["" : 18, "f" : 1]>
agraph (float[n,3] x, bool c, float[3,4] w1, float[4,2] w2, float[4] b) => (float[n,2] y)
{
    h = f.Linear<alpha=2.0>(x, w1, b)
    k = If (c) <then_branch = t () => (float[n,4] u) { u = f.Act(h) },
                else_branch = e () => (float[n,4] v) { v = f.Act:steep<slope=0.3>(h) }>
    y = f.Linear(k, w2)
}
<domain: "f", opset_import: ["" : 18, "f" : 1]>
Linear <alpha: float = 1.0> (x, w, b) => (y)
{
    h = MatMul(x, w)
    s = Constant<value_float: float = @alpha>()
    g = Mul(h, s)
    y = f.Pass(g, b)
}
<domain: "f", opset_import: ["" : 18]>
Pass (x, b) => (y) { y = Identity(x) }
<domain: "f", opset_import: ["" : 18]>
Act <slope: float = 0.1> (x) => (y) { h = LeakyRelu<alpha: float = @slope>(x)
 y = Tanh(h) }
<domain: "f", opset_import: ["" : 18], overload: "steep">
Act <slope: float = 0.1> (x) => (y) { h = LeakyRelu<alpha: float = @slope>(x)
 y = Sigmoid(h) }
"""


def mlp() -> ir.Model:
    """Two linear layers written as calls; the activation is an overloaded function in the branches of an If."""
    proto = onnx.parser.parse_model(MLP.replace("f.Act:steep", "f.Act"))
    choice = next(node for node in proto.graph.node if node.op_type == "If")
    other = next(a for a in choice.attribute if a.name == "else_branch")
    other.g.node[0].overload = "steep"
    model = ir.from_proto(proto)
    random = np.random.default_rng(0)
    for value in model.graph.inputs[2:]:
        value.const_value = ir.Tensor(random.normal(size=value.shape.numpy()).astype(np.float32), name=value.name)
    weights = model.graph.inputs[2:]
    del model.graph.inputs[2:]
    for value in weights:
        model.graph.register_initializer(value)
    infer_shapes(model)
    return model


def test_calls_give_way_to_what_they_compute() -> None:
    """Nested calls, overloads, calls in bodies, attributes with and without defaults, operands left out."""
    model = mlp()
    dense = model.clone()
    assert inline_functions(model) == ["4 model-local functions were inlined"]
    infer_shapes(model)
    assert not model.functions
    assert {n.op_type for n in model.graph.all_nodes()} >= {"MatMul", "If", "Tanh", "Sigmoid"}
    assert compare(dense, model, random_feeds(dense, 0)).worst_relative < 1e-6
    coupling = analyse(model)
    assert len(coupling.units) == 4
    assert {m.parameter for m in coupling.units[0].members} == {"w1", "w2"}
    assert certify(model, coupling, choose(coupling, 0.5, 1)).holds


def test_metadata_of_a_call_goes_to_its_nodes() -> None:
    model = mlp()
    model.graph[0].metadata_props["namespace"] = "encoder.first"
    inline_functions(model)
    product = next(n for n in model.graph if n.op_type == "MatMul")
    assert product.metadata_props["namespace"] == "encoder.first"


def test_a_function_of_another_opset_stays_a_call() -> None:
    model = mlp()
    next(f for f in model.functions.values() if f.name == "Pass").opset_imports[""] = 17
    notes = inline_functions(model)
    assert "function Pass is left as it is: it uses opset 17 of ai.onnx, the model 18" in notes
    assert [n.op_type for n in model.graph if n.domain == "f"] == ["Pass", "Pass"]
    assert not analyse(model).units


def test_functions_that_call_themselves_are_refused() -> None:
    model = mlp()
    function = next(f for f in model.functions.values() if f.name == "Pass")
    function.append(ir.node("Pass", [function.inputs[0], function.inputs[1]], domain="f"))
    with pytest.raises(ModelError, match="cannot be inlined"):
        inline_functions(model)


def test_inspect_and_shrink_look_into_functions() -> None:
    model = mlp()
    assert graphopt.inspect(model).units.units == 4
    assert model.functions  # inspecting changes nothing
    inlined = model.clone()
    prepare(inlined)
    coupling = analyse(inlined)
    weight = model.graph.initializers["w1"]
    array = weight.const_value.numpy().copy()
    array[:, [m.indices[0] for m in coupling.units[1].members if m.parameter == "w1"]] = 0
    weight.const_value = ir.Tensor(array, name="w1")
    dense = model.clone()
    result = Shrink().run(model, Context(Target("cpu", "ort"), None, None, 0, 1, Silent()))
    # Tanh(0) = 0 in one branch, Sigmoid(0) = 1/2 in the other: not one constant, so nothing may go.
    assert not result.changed
    for node in dense.functions[("f", "Act", "steep")]:
        if node.op_type == "Sigmoid":
            node.op_type = "Softsign"
    again = dense.clone()
    result = Shrink().run(again, Context(Target("cpu", "ort"), None, None, 0, 1, Silent()))
    assert result.changed
    assert any("inlined" in note for note in result.notes)
    assert again.graph.initializers["w1"].const_value.shape.numpy() == (3, 3)
    assert compare(dense, again, random_feeds(dense, 0)).worst_relative < 1e-5


def test_values_in_bodies_get_names_of_their_own() -> None:
    model = graph(
        "(float[n,3] x, bool c) => (float[n,2] y)",
        """h = MatMul(x, w1)
           k = If (c) <then_branch = t () => (float[n,4] u) { t = Relu(h)  u = Neg(t) },\
                       else_branch = e () => (float[n,4] u) { t = Neg(h)  u = Relu(t) }>
           y = MatMul(k, w2)""",
        w1=(3, 4),
        w2=(4, 2),
    )
    dense = model.clone()
    assert distinct_names(model) == 2
    assert distinct_names(model) == 0
    assert compare(dense, model, random_feeds(dense, 0)).worst_relative == 0
    coupling = analyse(model)
    assert len(coupling.units) == 4
    zero_units(model, coupling, {2})
    dense = model.clone()
    assert Shrink().run(model, Context(Target("cpu", "ort"), None, None, 0, 1, Silent())).changed
    assert compare(dense, model, random_feeds(dense, 0)).worst_relative < 1e-5


def test_a_model_that_is_ready_stays_as_it_is() -> None:
    model = graph("(float[n,3] x) => (float[n,2] y)", "y = MatMul(x, w)", w=(3, 2))
    before = ir.to_proto(model).SerializeToString()
    assert prepare(model) == []
    assert ir.to_proto(model).SerializeToString() == before

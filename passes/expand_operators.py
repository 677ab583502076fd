"""expand-operators: operators become the nodes that the standard defines them by.

For runtimes and compilers without kernels of their own for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import onnx_ir as ir

from graphopt.base import Context, Effect, Pass, PassResult, Skip, option
from graphopt.files.opset import opset_of
from graphopt.files.shape_inference import infer_shapes
from graphopt.rewriting.nodes import is_onnx, label
from graphopt.rewriting.prepare import inline_functions

if TYPE_CHECKING:
    from onnx import FunctionProto

_DOMAIN = "graphopt.expanded"


@dataclass(frozen=True)
class ExpandOperators(Pass):
    """Write operators out as the standard defines them, such as RotaryEmbedding or SoftmaxCrossEntropyLoss.

    Algebra: the function bodies of the operators' definitions (onnx.defs). Exact up to rounding.
    Does not fire: on operators that the standard does not define by others, or not in the model's opset, and where a
    definition that depends on the types of the inputs finds them unknown.
    Preserves: names of results, symbolic sizes.
    """

    name: ClassVar[str] = "expand-operators"
    effect: ClassVar[Effect] = Effect.EXACT
    operators: tuple[str, ...] = option((), "operators of the standard to write out, such as (RotaryEmbedding,Celu)")

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Write out every node of these operators, in every graph."""
        result = PassResult(False)
        opset = opset_of(model)
        done: dict[str, int] = {}
        for node in list(model.graph.all_nodes()):
            if not is_onnx(node, *self.operators):
                continue
            operator, where = node.op_type, label(node)
            if _made_a_call(model, node, opset):
                done[operator] = done.get(operator, 0) + 1
            else:
                result.skipped.append(
                    Skip(where, f"the standard does not define {operator} by others in opset {opset}")
                )
        if done:
            inline_functions(model)
            model.opset_imports.pop(_DOMAIN, None)
            infer_shapes(model)
            result.changed = True
            result.notes.append(f"written out: {', '.join(f'{count} {name}' for name, count in done.items())}")
        return result


def _made_a_call(model: ir.Model, node: ir.Node, opset: int) -> bool:
    """Make a node the call of a function of its own, its definition; False where there is none."""
    import onnx

    schema: Any = onnx.defs.get_schema(node.op_type, opset, "")
    body = _definition(schema, node, opset)
    if body is None:
        return False
    known = set(node.attributes)
    for name, attribute in schema.attributes.items():
        if name not in known and attribute.default_value.type != onnx.AttributeProto.UNDEFINED:
            node.attributes[name] = ir.serde.deserialize_attribute(attribute.default_value)
    del body.output[len(node.outputs) :]  # a definition may lack outputs that are not asked for
    body.domain, body.name = _DOMAIN, f"{node.op_type}_{len(model.functions)}"
    del body.opset_import[:]
    body.opset_import.append(onnx.helper.make_opsetid("", opset))
    del body.attribute[:], body.attribute_proto[:]
    body.attribute.extend(node.attributes)
    function = ir.serde.deserialize_function(body)
    model.functions[function.identifier()] = function
    model.opset_imports[_DOMAIN] = 1
    node.domain, node.op_type, node.version = _DOMAIN, body.name, None
    return True


def _definition(schema: Any, node: ir.Node, opset: int) -> FunctionProto | None:
    """The newest definition of an operator in terms of an opset that is not newer than the model's."""
    import onnx

    body = onnx.FunctionProto()
    if plain := [version for version in schema.function_opset_versions if version <= opset]:
        body.ParseFromString(schema.get_function_with_opset_version(max(plain)))
        return body
    dependent = [version for version in schema.context_dependent_function_opset_versions if version <= opset]
    if not dependent:
        return None
    types = []
    for value in node.inputs:
        if value is not None and (value.type is None or value.shape is None):
            return None
        types.append(b"" if value is None else ir.serde.serialize_value(value).type.SerializeToString())
    made = schema.get_context_dependent_function_with_opset_version(
        max(dependent), ir.to_proto(node).SerializeToString(), types
    )
    body.ParseFromString(made)
    made_here = {name for part in body.node for name in part.output}
    return body if set(body.output[: len(node.outputs)]) <= made_here else None

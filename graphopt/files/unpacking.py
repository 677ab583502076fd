"""Model-local functions that unpack stored weights, in operators of the standard, so that any runtime can.

They stand in the domain `graphopt.sparse`, and a call of one takes the place of the weight. ONNX Runtime inlines and
folds them when it loads the model: afterwards the weights are there as if they had been stored in full.

`Groups1`, `Groups2`, `Groups4` (positions of 1, 2, 4 bits): the position of the i-th value along the axis is its code
plus the start of its group, M * (i / N). `Mask`: the j-th element is value number (bits set up to j), where its own bit
is set, and value 0, the filler, elsewhere. The inverse in numpy, and the formats: `graphopt.numerics.packing`.
"""

from __future__ import annotations

import functools

import onnx_ir as ir

DOMAIN = "graphopt.sparse"
VERSION = 1
"""Of the domain: raised when the stored formats change."""

OPSET_MIN = 11
"""Before it there are no operators to take bits apart."""
IR_MIN = 8
"""Before it models had no functions."""

_CODES = """
  shifts = Constant <value = uint8[{in_byte}] {{{shifts}}}> ()
  base = Constant <value = uint8[1] {{{base}}}> ()
  column = Constant <value = int64[2] {{-1, 1}}> ()
  line = Constant <value = int64[1] {{-1}}> ()
  start = Constant <value = int64[1] {{0}}> ()
  count = Constant <value_ints: ints = @count> ()
  byte = Reshape (packed, column)
  shifted = BitShift <direction = "RIGHT"> (byte, shifts)
  parts = Mod (shifted, base)
  every = Reshape (parts, line)
  codes = Slice (every, start, count)
"""

_GROUPS = """
<domain: "{domain}", opset_import: ["" : {opset}]>
Groups{bits} <count, shape, fill, axis, keep, of, kept, along> (values, packed) => (dense)
{{
""" + _CODES + """
  layout = Shape (values)
  placed = Reshape (codes, layout)
  code = Cast <to = 6> (placed)
  zero = Constant <value = int64 {{0}}> ()
  one = Constant <value = int64 {{1}}> ()
  keep = Constant <value_int: int = @keep> ()
  of = Constant <value_int: int = @of> ()
  kept = Constant <value_int: int = @kept> ()
  along = Constant <value_ints: ints = @along> ()
  number = Range (zero, kept, one)
  group = Div (number, keep)
  first = Mul (group, of)
  firsts = Reshape (first, along)
  offset = Cast <to = 6> (firsts)
  places = Add (code, offset)
  shape = Constant <value_ints: ints = @shape> ()
  fill = Constant <value: tensor = @fill> ()
  empty = Expand (fill, shape)
  dense = ScatterElements <axis: int = @axis> (empty, places, values)
}}
"""  # fmt: skip

_MASK = """
<domain: "{domain}", opset_import: ["" : {opset}]>
Mask <count, shape> (values, packed) => (dense)
{{
""" + _CODES + """
  axis = Constant <value = int64 {{0}}> ()
  shape = Constant <value_ints: ints = @shape> ()
  bits = Cast <to = 6> (codes)
  rank = CumSum (bits, axis)
  place = Mul (rank, bits)
  flat = Gather (values, place)
  dense = Reshape (flat, shape)
}}
"""  # fmt: skip

NAMES = {"Groups1": 1, "Groups2": 2, "Groups4": 4, "Mask": 1}
"""Bits of one code of every function."""


@functools.cache
def _encoded(name: str, opset: int) -> bytes:
    from onnx import parser

    bits = NAMES[name]
    text = (_MASK if name == "Mask" else _GROUPS).format(
        domain=DOMAIN,
        opset=max(opset, 12),  # attributes of numbers become constants from opset 12 on; all else is older
        bits=bits,
        in_byte=8 // bits,
        base=1 << bits,
        shifts=", ".join(map(str, range(0, 8, bits))),
    )
    encoded: bytes = parser.parse_function(text).SerializeToString(deterministic=True)
    return encoded


def function(name: str, opset: int) -> ir.Function:
    """One of the functions, for a model of this opset.

    Args:
        name: a key of `NAMES`.
        opset: version of the default operator set, at least `OPSET_MIN`.
    """
    import onnx

    return ir.serde.deserialize_function(onnx.FunctionProto.FromString(_encoded(name, opset)))


def is_ours(found: ir.Function, opset: int) -> bool:
    """Whether a function of a file is, node by node, one that this version writes."""
    if found.name not in NAMES or found.domain != DOMAIN:
        return False
    own = ir.serde.serialize_function(function(found.name, opset)).SerializeToString(deterministic=True)
    return bool(ir.serde.serialize_function(found).SerializeToString(deterministic=True) == own)

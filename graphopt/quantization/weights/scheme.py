"""Weights as integers of 8 or 4 bits while activations stay floats: smaller files, faster products of matrices.

Which form a weight gets is decided weight by weight, by what the target has (`graphopt.target.WeightKernels`):

1. kernels that compute from blocks of integers (`block_kernels`), where they gain;
2. DequantizeLinear, on targets whose runtime knows a product by it (`dequantised`);
3. a look-up of rows of integers in large tables (`embeddings`);
4. arithmetic that runtimes fold when they load (`unpacked`): a smaller file, the speed of floats.

So no layer becomes slower than it was. A weight that several nodes read is stored once, or not quantised at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

import onnx_ir as ir

from graphopt.base import Skip
from graphopt.files.opset import opset_of, raise_opset
from graphopt.quantization.rounding.interface import Rounding
from graphopt.quantization.weights.block_kernels import compute_from_blocks, kernel_block, kernel_reason
from graphopt.quantization.weights.dequantised import OPSET_BLOCKS, OPSET_CHANNELS, dequantise, dequantise_reason
from graphopt.quantization.weights.embeddings import look_up_rows, rows_reason
from graphopt.quantization.weights.readers import Weight, key_of, weights_of
from graphopt.quantization.weights.unpacked import OPSET_MIN, stored_bytes, unpack_when_loaded
from graphopt.rewriting.names import Names
from graphopt.rewriting.nodes import is_onnx, label
from graphopt.target import WeightKernels

WORTH = 0.8
"""Weights of 4 bits that take more than this share of the bytes of 8 bits, scales and nodes included, get 8 bits."""

BLOCK = 32
"""Columns that share a scale where no kernel sets the pace: an eighth more bytes than without blocks at 8 bits."""


@dataclass
class Written:
    """What came of it.

    Attributes:
        forms: form by key: "kernel", "dequantised", "rows" or "unpacked".
        skipped: nodes that stay in float, with the reason.
        notes: sentences for the report.
    """

    forms: dict[str, str] = field(default_factory=dict)
    skipped: list[Skip] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def weight_layers(
    model: ir.Model,
    *,
    bits: int,
    block: int | None = None,
    symmetric: bool | None = None,
    exclude: tuple[str, ...] = (),
    kernels: WeightKernels,
) -> tuple[dict[str, str], list[Skip]]:
    """Nodes whose weights can be stored as integers.

    Args:
        model: with inferred shapes; not changed. Nodes of branch and loop bodies count.
        bits: 4 or 8.
        block: columns that share a scale; None: what is best for the form.
        symmetric: without zero points; None: for 8 bits.
        exclude: globs over names of nodes that stay in float.
        kernels: of the target.

    Returns:
        labels by key, in the order of the graph, and the nodes with weights that cannot be, with the reason.
    """
    weights, skipped = weights_of(model, exclude)
    found: dict[str, str] = {}
    refused: dict[str, Skip] = {}
    for weight in weights:
        form = _form(weight, kernels, bits, block, _is_symmetric(symmetric, bits), opset_of(model))
        for reader in weight.readers:
            if form.refusal:
                refused.setdefault(reader.key, Skip(label(reader.node), form.refusal))
            else:
                found.setdefault(reader.key, label(reader.node))
    skipped += [skip for key, skip in refused.items() if key not in found]
    return found, skipped


def write_weights(
    model: ir.Model,
    keys: Collection[str],
    *,
    bits: int,
    block: int | None = None,
    symmetric: bool | None = None,
    rounding: Rounding,
    kernels: WeightKernels,
) -> Written:
    """Store the weights of nodes as integers, in place.

    Args:
        model: with inferred shapes.
        keys: of nodes (`weight_layers`).
        bits: 4 or 8.
        block: columns that share a scale, a power of two where a kernel is to take it; None: what is best for the form.
        symmetric: without zero points; None: for 8 bits.
        rounding: makes weights integers.
        kernels: of the target.

    Raises:
        ValueError: other bits than 4 and 8.
    """
    if bits not in (4, 8):
        raise ValueError(f"{bits} bits: weights have 4 or 8")
    done = Written()
    if not keys:
        return done
    even = _is_symmetric(symmetric, bits)
    if kernels.form == "DequantizeLinear":
        _raise_opset(model, done, bits, block)
    names = Names(model)
    reasons: Counter[str] = Counter()
    wider = 0
    weights, skipped = weights_of(model)
    wanted = [weight for weight in weights if set(weight.keys) & set(keys)]
    for weight in wanted:
        missing = [reader for reader in weight.readers if reader.key not in keys]
        form = _form(weight, kernels, bits, block, even, opset_of(model))
        if missing:
            form.refusal = f"its weight is shared with {label(missing[0].node)}, which stays in float"
        if form.refusal:
            done.skipped += [Skip(label(r.node), form.refusal) for r in weight.readers if r.key in keys]
            continue
        if form.name == "kernel":
            compute_from_blocks(
                model, weight, names, bits=bits, block=form.block or 0, symmetric=even, rounding=rounding
            )
        elif form.name == "dequantised":
            dequantise(weight, names, bits=bits, block=form.block, rounding=rounding)
        elif form.name == "rows":
            look_up_rows(weight, names, rounding=rounding)
        else:
            unpack_when_loaded(
                weight, names, bits=form.bits, block=form.block, symmetric=form.symmetric, rounding=rounding
            )
            reasons[form.why] += len(weight.readers)
            wider += len(weight.readers) if form.bits > bits else 0
        for key in weight.keys:
            done.forms.setdefault(key, form.name)
    done.skipped += [skip for skip in skipped if skip.node in _labels(model, keys)]
    done.notes += _notes(done, reasons, bits)
    if wider:
        done.notes.append(
            f"{wider} of these have 8 bits: small tables, of whose rows no sum averages the errors, and weights that 4"
            f" bits would not make {1 - WORTH:.0%} smaller, scales and nodes included (block= asks for 4 bits anyway)"
        )
    return done


@dataclass
class _Form:
    """How a weight is stored: in which form, grid and about how many bytes; why in no other form, or why not at all."""

    name: str
    block: int | None
    bits: int
    symmetric: bool
    why: str = ""
    refusal: str = ""
    stored: int = 0


def _is_symmetric(symmetric: bool | None, bits: int) -> bool:
    return bits == 8 if symmetric is None else symmetric


def _form(weight: Weight, kernels: WeightKernels, bits: int, block: int | None, symmetric: bool, opset: int) -> _Form:
    columns = weight.readers[0].matrices(weight.array).shape[2]
    if kernels.form == "MatMulNBits":
        power = kernel_block(columns, block or kernels.block)
        why = kernel_reason(weight, kernels, bits, power)
        if why is None:
            return _Form("kernel", power, bits, symmetric)
    elif kernels.form == "DequantizeLinear":
        wide = (block or kernels.block) if bits == 4 else block
        why = dequantise_reason(weight, bits, wide)
        return _Form("dequantised", wide, bits, True, refusal=why or "")
    else:
        why = "the target has no kernel that computes from blocks of integers"
    if rows_reason(weight, bits, block, kernels.table) is None:
        return _Form("rows", None, bits, True)
    form = _unpacked(weight, why, bits, block, symmetric, opset)
    if bits == 4 and block is None:
        eight = _unpacked(weight, why, 8, None, True, opset)
        lookup = all(is_onnx(reader.node, "Gather") for reader in weight.readers)
        if not eight.refusal and (lookup or form.refusal or form.stored > WORTH * eight.stored):
            return eight
    return form


def _unpacked(weight: Weight, why: str, bits: int, block: int | None, symmetric: bool, opset: int) -> _Form:
    own = block or (BLOCK if bits == 4 or weight.readers[0].node.op_type in ("MatMul", "Gemm") else None)
    form = _Form("unpacked", own, bits, symmetric, why)
    form.stored = stored_bytes(weight, bits=bits, block=own, symmetric=symmetric)
    if opset < OPSET_MIN:
        form.refusal = f"opset {opset} cannot take bytes apart, {OPSET_MIN} can: export the model with a newer one"
    elif bits == 4 and weight.tensor.size % 2:
        form.refusal = "it has an odd number of elements, and two share a byte"
    elif form.stored >= weight.tensor.nbytes:
        form.refusal = f"too small: {weight.tensor.nbytes} bytes, and integers with their scales take {form.stored}"
    return form


def _raise_opset(model: ir.Model, done: Written, bits: int, block: int | None) -> None:
    """Bring the model to the opset that DequantizeLinear needs."""
    blocks = bits == 4 or block is not None
    what = f"weights of {bits} bits" + (" in blocks" if blocks else "")
    note = raise_opset(model, OPSET_BLOCKS if blocks else OPSET_CHANNELS, what)
    if note:
        done.notes.append(note)


def _labels(model: ir.Model, keys: Collection[str]) -> set[str]:
    return {label(node) for graph in (model.graph, *model.graph.subgraphs()) for node in graph if key_of(node) in keys}


def _notes(done: Written, reasons: Counter[str], bits: int) -> list[str]:
    count = Counter(done.forms.values())
    notes = []
    if count["kernel"]:
        notes.append(f"{count['kernel']} nodes compute from weights of {bits} bits")
    if count["dequantised"]:
        notes.append(f"{count['dequantised']} nodes read weights of {bits} bits through DequantizeLinear")
    if count["rows"]:
        notes.append(f"{count['rows']} look-ups read rows of {bits} bits")
    if count["unpacked"]:
        why = "; ".join(f"{n} because {reason}" for reason, n in reasons.most_common(3))
        notes.append(
            f"{count['unpacked']} nodes have weights of {bits} bits in the file, which become floats when it is loaded,"
            f" at the speed of floats ({why})"
        )
    return notes

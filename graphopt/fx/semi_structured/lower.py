"""An ONNX model as a torch module for one device: sparse layers where weights are 2:4, types, everything placed.

Products run in the model's own types, or in a wanted one under `torch.autocast`, which keeps in float32 what needs it
(powers, exponentials, norms). A layer becomes sparse where its weight is 2:4 along the input channels, fits
the type, and where padding it to legal sizes leaves work to save. Every layer's fate is told.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graphopt.fx.from_torch import as_array
from graphopt.fx.semi_structured.kernels import Kernel, kernel_for, legal
from graphopt.fx.semi_structured.match import Blocks, Linear, linear_layers
from graphopt.fx.semi_structured.modules import BlockDiagonal, SparseLinear, SparseLinearInt8
from graphopt.fx.to_torch import to_torch
from graphopt.sparsity.found import fullest_groups

if TYPE_CHECKING:
    import onnx_ir as ir

MOST_PADDING = 2.0
"""Elements of the padded weight over its own at which 2 of 4 saves nothing any more."""


@dataclass(frozen=True)
class Fate:
    """What became of one linear layer.

    Attributes:
        layer: name of its weight.
        runs: 'cusparselt', 'cutlass': on sparse tensor cores; 'dense': multiplied with its zeros.
        reason: why it is dense; '' for a sparse one.
        shape: (outputs, inputs) of the weight; None where it is no matrix.
        padded: the same as the kernel holds it; None for a layer that stayed as it was.
        dtype: type of the operands.
        wrappers: block sizes of its wrappers, as 'in 32', 'out 16'.
    """

    layer: str
    runs: str
    reason: str
    shape: tuple[int, int] | None = None
    padded: tuple[int, int] | None = None
    dtype: str = ""
    wrappers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Lowered:
    """A module on its device.

    Attributes:
        module: takes the model's inputs by position.
        inputs, outputs: their names.
        device: where it is.
        dtype: of its products; None: as the model has them.
        fates: of its linear layers.
    """

    module: torch.fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype | None
    fates: tuple[Fate, ...]

    @contextlib.contextmanager
    def modes(self) -> Iterator[None]:
        """Under which the module computes: no gradients, products in its type."""
        with torch.no_grad():
            if self.dtype is None:
                yield
                return
            # the cache of autocast holds copies of weights, which a recorded graph of kernels must not meet
            with torch.autocast(self.device.type, self.dtype, cache_enabled=False):
                yield

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Outputs for inputs on the device."""
        with self.modes():
            result = self.module(*inputs)
        return result if isinstance(result, tuple) else (result,)


def lower(model: ir.Model, device: torch.device, dtype: torch.dtype | None) -> Lowered:
    """Make a module for a device.

    Args:
        model: the model; not changed.
        device: where it shall run.
        dtype: of its products, float16 or bfloat16; None: as the model has them. What is quantised stays so.

    Raises:
        ModelError: operators that `to_torch` does not cover.
    """
    module = to_torch(model)
    inputs, outputs = module.meta["inputs"], module.meta["outputs"]
    fates = _replace(module, device, dtype)
    if dtype is not None:
        _narrow(module, dtype)
    module = module.to(device).requires_grad_(False).eval()
    return Lowered(module, tuple(inputs), tuple(outputs), device, dtype, tuple(fates))


def _replace(module: torch.fx.GraphModule, device: torch.device, dtype: torch.dtype | None) -> list[Fate]:
    """Put modules in place of the layers that can be sparse, in place."""
    kernels: dict[torch.dtype, tuple[Kernel, str]] = {}
    builder = _Builder(module, device, dtype)
    fates = []
    for found in linear_layers(module):
        if isinstance(found, tuple):
            fates.append(Fate(found[0], "dense", found[1]))
            continue
        kind = torch.int8 if found.quantised is not None else dtype or found.weight.dtype
        if kind not in kernels:
            kernels[kind] = kernel_for(device, kind)
        kernel, why_dense = kernels[kind]
        reason = _refusal(found, kernel, kind)
        shape = (int(found.weight.shape[0]), int(found.weight.shape[1]))
        name = str(kind).removeprefix("torch.")
        if reason:
            fates.append(Fate(found.name, "dense", reason, shape, None, name))
            continue
        builder.build(found, kernel)
        sides = [f"{side} {w.blocks.shape[1]}" for side, w in (("in", found.inner), ("out", found.outer)) if w]
        padded = _padded_shape(shape, kernel, kind)
        fates.append(Fate(found.name, kernel, why_dense, shape, padded, name, tuple(sides)))
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    _forget_unused(module)
    return fates


def _refusal(layer: Linear, kernel: Kernel, dtype: torch.dtype) -> str:
    """Why a layer stays as it is; '' where it becomes sparse."""
    weight = layer.weight if layer.quantised is None else layer.quantised.weight
    if weight.shape[1] < 4:
        return f"{weight.shape[1]} inputs are no group of 4"
    fullest = fullest_groups(as_array(weight), [4])[4]
    if fullest > 2:
        return f"its weight is not 2:4: {fullest} of a group of 4 are not zero"
    if layer.quantised is None:
        limit = torch.finfo(dtype).max
        parts = [layer.weight, layer.bias, *(w.blocks for w in (layer.inner, layer.outer) if w)]
        if any(part is not None and float(part.abs().max()) > limit for part in parts):
            return f"its weights overflow {str(dtype).removeprefix('torch.')}"
    rows, columns = _padded_shape((int(weight.shape[0]), int(weight.shape[1])), kernel, dtype)
    growth = rows * columns / weight.numel()
    if growth >= MOST_PADDING:
        return f"padded to {rows}x{columns} it is {growth:.1f} times as large, and 2:4 saves half"
    return ""


def _padded_shape(shape: tuple[int, int], kernel: Kernel, dtype: torch.dtype) -> tuple[int, int]:
    sizes = legal(kernel, dtype)
    return shape[0] + -shape[0] % sizes.rows, shape[1] + -shape[1] % sizes.columns


class _Builder:
    """Writes sparse layers into a graph; wrappers that several layers read are written once."""

    def __init__(self, module: torch.fx.GraphModule, device: torch.device, dtype: torch.dtype | None) -> None:
        self._module, self._device, self._dtype = module, device, dtype
        self._batches: dict[tuple[torch.fx.Node, tuple[int, ...]], torch.fx.Node] = {}
        self._wrapped: dict[tuple[torch.fx.Node, tuple[int, ...]], torch.fx.Node] = {}

    def build(self, layer: Linear, kernel: Kernel) -> None:
        """Replace one layer; those of one graph in its order."""
        with self._module.graph.inserting_before(layer.node):
            made = self._float(layer, kernel) if layer.quantised is None else self._int8(layer, kernel)
        # the new node stands where the product stood: what the layer's end gave its readers, it gives now
        layer.end.replace_all_uses_with(made)

    def _float(self, layer: Linear, kernel: Kernel) -> torch.fx.Node:
        source = layer.x if layer.inner is None else layer.inner.source
        batch = self._strided(source, layer)
        arguments = [batch]
        if layer.inner is not None:
            arguments.append(self._wrapper(layer.inner, batch, layer))
        outer = None if layer.outer is None else self._placed(layer.outer.blocks)
        bias = None if layer.bias is None else self._placed(layer.bias)
        module = SparseLinear(self._placed(layer.weight), bias, outer, layer.layout, kernel)
        return self._call(module, arguments)

    def _int8(self, layer: Linear, kernel: Kernel) -> torch.fx.Node:
        found = layer.quantised
        assert found is not None
        bias = None if layer.bias is None else layer.bias.float().to(self._device)
        module = SparseLinearInt8(
            found.weight.contiguous().to(self._device), found.scale.to(self._device), found.zero_point, bias,
            self._dtype or layer.weight.dtype, layer.layout, kernel, unsigned=found.unsigned,
        )  # fmt: skip
        return self._call(module, [self._strided(found.source, layer)])

    def _wrapper(self, wrapper: Blocks, batch: torch.fx.Node, layer: Linear) -> torch.fx.Node:
        key = (wrapper.end, layer.strides)
        if key not in self._wrapped:
            module = BlockDiagonal(self._placed(wrapper.blocks), layer.layout)
            self._wrapped[key] = self._call(module, [batch])
        return self._wrapped[key]

    def _strided(self, source: torch.fx.Node, layer: Linear) -> torch.fx.Node:
        """Every so many pixels of a batch, which is what a 1x1 convolution with strides reads."""
        if all(stride == 1 for stride in layer.strides):
            return source
        key = (source, layer.strides)
        if key not in self._batches:
            self._batches[key] = self._module.graph.call_function(every, (source, layer.strides))
        return self._batches[key]

    def _placed(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, self._dtype).contiguous()

    def _call(self, module: torch.nn.Module, arguments: list[torch.fx.Node]) -> torch.fx.Node:
        name = f"sparse_{len(self._module._modules)}"
        while name in self._module._modules:
            name += "_"
        self._module.add_module(name, module)
        return self._module.graph.call_module(name, tuple(arguments))


def every(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Every so many positions of the spatial axes."""
    return x[(slice(None), slice(None), *(slice(None, None, stride) for stride in strides))]


def _narrow(module: torch.fx.GraphModule, dtype: torch.dtype) -> None:
    """Parameters in the type of the products, where their values fit; numbers and statistics keep theirs."""
    limit = torch.finfo(dtype).max
    for parameter in module.parameters():
        if parameter.numel() and float(parameter.detach().abs().max()) <= limit:
            parameter.data = parameter.data.to(dtype)


def _forget_unused(module: torch.fx.GraphModule) -> None:
    """Drop stored tensors that no node reads any more."""
    module.delete_all_unused_submodules()
    used = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    calls = {str(node.target) for node in module.graph.nodes if node.op == "call_module"}
    for name, _ in [*module.named_parameters(), *module.named_buffers()]:
        folder, _, leaf = name.rpartition(".")
        if name not in used and folder not in calls and not any(folder.startswith(f"{call}.") for call in calls):
            delattr(module.get_submodule(folder), leaf)


def summary(fates: tuple[Fate, ...]) -> str:
    """How many linear layers are sparse, and the reasons of the others, the most frequent first; one line."""
    reasons = Counter(fate.reason.partition(": ")[0] for fate in fates if fate.runs == "dense")
    line = f"{len(fates) - reasons.total()} of {len(fates)} linear layers on sparse tensor cores"
    return "; ".join([line, *(f"{count} dense: {reason}" for reason, count in reasons.most_common())])


def fate_rows(fates: tuple[Fate, ...]) -> list[dict[str, Any]]:
    """As plain data, for manifests and reports."""
    from dataclasses import asdict

    return [{key: value for key, value in asdict(fate).items() if value not in (None, "", ())} for fate in fates]

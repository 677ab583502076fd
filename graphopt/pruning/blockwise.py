"""Refitting the layer before a cut together with the layer behind it, to what the block puts out.

Where units between two layers were removed, y = W2 f(W1 x), refitting W2 alone can only combine what W1 still makes of
x. Here W1 moves as well, so that the channels that stay carry what is wanted of those that went. With the residual
r = t - y and the target t of the second layer (`graphopt.pruning.reconstruct`), one step is

    g = f'(W1 x) * W2^T r,    D = C_gx (S_xx + lam I)^-1,    W1 <- W1 + mu (D + beta D_before),

the gradient of |r|^2 in the metric of what it does to W1 x (Gauss-Newton on the input's side; Martens & Grosse, K-FAC,
arXiv:1503.05671), with conjugate directions (Polak & Ribiere) and mu by the secant of y along the direction. A step is
kept only if the error falls. The second layer is then fitted anew by least squares, which can only lower it further.

f is any operator of one input that works element by element; its slope is measured by differences. Moments are
streamed, as everywhere here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.numerics.least_squares import solve
from graphopt.numerics.moments import Moments
from graphopt.pruning.walk import Walk
from graphopt.rewriting.layers import Layer
from graphopt.rewriting.nodes import is_onnx

if TYPE_CHECKING:
    from graphopt.executor import Session

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

UNARY = ("Relu", "LeakyRelu", "Elu", "Selu", "Gelu", "Sigmoid", "Tanh", "HardSwish", "HardSigmoid", "Softplus", "Mish")
RIDGE = 1e-2
POSITIONS = 1 << 17
"""Positions that one step looks at."""

HALVINGS = 3
DIFFERENCE = 1e-2


@dataclass(frozen=True)
class Block:
    """Two layers with nothing but an activation between them, that nobody else reads.

    Attributes:
        first, second: the layers.
        activation: the node between; None where there is none.
    """

    first: Layer
    second: Layer
    activation: ir.Node | None


def block_before(second: Layer, layers: Mapping[str, Layer]) -> Block | None:
    """The block that ends in a layer."""
    made = {layer.linear.output: layer for layer in layers.values()}
    value = second.linear.input
    activation = None
    producer = value.producer()
    if value not in made and producer is not None and is_onnx(producer, *UNARY) and producer.inputs[0] is not None:
        if len(list(value.uses())) != 1 or value.is_graph_output():
            return None
        activation, value = producer, producer.inputs[0]
    first = made.get(value)
    if first is None or first.groups != 1 or len(list(value.uses())) != 1 or value.is_graph_output():
        return None
    return Block(first, second, activation)


class Descent:
    """Steps of the first layer of a block.

    Args:
        block: the two layers.
        outputs, inputs: channels of the first layer that stay, (outputs,), (inputs,).
        samples: expected number of samples, None where unknown: enough of them are taken for `POSITIONS`.
    """

    def __init__(
        self, block: Block, outputs: npt.NDArray[np.bool_], inputs: npt.NDArray[np.bool_], samples: int | None
    ) -> None:
        self.block = block
        self._alive = outputs
        self._columns = np.flatnonzero(np.repeat(inputs, block.first.kernel))
        self._samples = samples
        self._slope = _Slope(block.activation) if block.activation is not None else None
        self._before: tuple[Floats, Floats, float] | None = None  # direction, gradient, their product

    def step(self, target: str, goals: Walk, walk: Walk, relu: bool) -> tuple[float, float]:
        """One step of the first layer, in place; mean squared errors before and after."""
        first = self.block.first
        moments = Moments(full=True)
        error = count = 0.0
        for now, residual in self._residuals(target, goals, walk, relu):
            error, count = error + float(np.square(residual, dtype=np.float64).sum()), count + residual.size
            x, p, h = now[first.source], now[first.output], now[self.block.second.source]
            pulled = self.block.second.pulled_back(residual, h.shape)
            gradient = pulled if self._slope is None else pulled * self._slope(p)
            for columns, wants in first.columns(x, gradient, 0):
                moments.update(columns, wants, axis=0)
        if not count:
            return 0.0, 0.0
        keep = self._columns
        cross = np.asarray(moments.cross)[:, keep]
        cross[~self._alive] = 0
        step = solve(np.asarray(moments.covariance)[np.ix_(keep, keep)], cross, np.zeros_like(cross), RIDGE)
        shift = np.where(self._alive, np.asarray(moments.mean_y), 0.0) - step @ np.asarray(moments.mean)[keep]
        weight = np.zeros((len(step), first.width))
        weight[:, keep] = step
        direction = np.concatenate([weight, shift[:, None] * first.has_bias], axis=1)
        power = float((step * cross).sum())
        if self._before is not None and self._before[2] > 0:
            beta = max(0.0, power - float((step * self._before[1]).sum())) / self._before[2]
            direction = direction + min(beta, 1.0) * self._before[0]
        self._before = (direction, cross, power)
        return error / count, self._search(direction, error / count, target, goals, walk, relu)

    def _search(self, direction: Floats, error: float, target: str, goals: Walk, walk: Walk, relu: bool) -> float:
        """Move along a direction as far as the secant says, less where the error does not fall."""
        first = self.block.first
        weight, bias = first.weight(), first.bias()

        def move(length: float) -> None:
            first.store(weight + length * direction[None, :, :-1], bias + length * direction[:, -1])

        outputs = [now[self.block.second.output] for now, _ in self._residuals(target, goals, walk, relu)]
        residuals = [r for _, r in self._residuals(target, goals, walk, relu)]
        length = 0.1 * np.sqrt(float(np.square(weight).sum()) / max(float(np.square(direction).sum()), 1e-30))
        move(length)
        along = energy = 0.0
        for y, r, (now, _) in zip(outputs, residuals, self._residuals(target, goals, walk, relu), strict=True):
            change = (now[self.block.second.output] - y).astype(np.float64) / length
            along, energy = along + float((change * r).sum()), energy + float(np.square(change).sum())
        best = along / energy if energy > 0 else 0.0
        for _ in range(HALVINGS):
            if best <= 0:
                break
            move(best)
            found = [(float(np.square(r, dtype=np.float64).sum()), r.size) for _, r in
                     self._residuals(target, goals, walk, relu)]  # fmt: skip
            after = sum(s for s, _ in found) / sum(n for _, n in found)
            if after < error:
                return after
            best /= 2
        move(0.0)
        return error

    def _residuals(self, target: str, goals: Walk, walk: Walk, relu: bool) -> Iterator[tuple[dict[str, Array], Array]]:
        """The block's tensors, and what its output lacks."""
        first, second = self.block.first, self.block.second
        names = list(dict.fromkeys((first.source, first.output, second.source, second.output, target)))
        for dense, now in zip(goals.stream([target]), walk.stream(names), strict=True):
            every = self._stride(now[second.output], now[first.output])
            part = {name: array[::every] for name, array in now.items()}
            goal, present = dense[target][::every], part[target]
            if relu:
                goal = np.where(goal > 0, goal, np.minimum(present, 0))
            yield part, goal - present

    def _stride(self, y: Array, p: Array) -> int:
        """Every how many samples are taken."""
        each = max(self.block.second.positions(y), self.block.first.positions(p)) / max(1, y.shape[0])
        return max(1, int(each * (self._samples or y.shape[0]) / POSITIONS))


class _Slope:
    """The derivative of an activation, by central differences."""

    def __init__(self, node: ir.Node) -> None:
        self._node = node
        self._session: Session | None = None

    def __call__(self, p: Array) -> Array:
        if self._session is None:
            self._session = self._open(p)
        given, result = self._session.inputs[0].name, self._session.output_names[0]
        up, down = (self._session.run({given: p + np.asarray(side * DIFFERENCE, p.dtype)})[result] for side in (1, -1))
        return np.asarray((up - down) / (2 * DIFFERENCE), p.dtype)

    def _open(self, p: Array) -> Session:
        from graphopt.executor import Session

        graph, given = self._node.graph, self._node.inputs[0]
        assert isinstance(graph, ir.Graph)
        assert given is not None
        view = ir.GraphView(
            [given], [self._node.outputs[0]], nodes=[self._node], opset_imports=graph.opset_imports, name="activation"
        )
        part = view.clone()
        part.inputs[0].type = ir.TensorType(ir.DataType.from_numpy(p.dtype))
        part.inputs[0].shape = ir.Shape([None] * p.ndim)
        part.outputs[0].shape = None
        return Session(ir.Model(part, ir_version=8))

"""Steps of a layer towards what the layer behind it wants."""

import numpy as np
import pytest
from redundant_net import images
from text_graph import graph

from graphopt.analysis.remove import remove_units
from graphopt.analysis.units import analyse
from graphopt.executor import Session
from graphopt.pipeline.clone import private_clone
from graphopt.progress import Silent
from graphopt.pruning.blockwise import Descent, block_before
from graphopt.pruning.families import candidates
from graphopt.pruning.reconstruct import Plan, reconstruct
from graphopt.pruning.walk import Walk
from graphopt.rewriting.layers import layers_of


def two_layers(activation="Relu", seed=0):
    return graph(
        "(float[n, 3, 6, 6] x) => (float[n, 4, 6, 6] y)",
        f"a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)  r = {activation} (a)  y = Conv <pads = [1, 1, 1, 1]> (r, w2, b2)",
        seed=seed, opset=20, w1=(10, 3, 3, 3), b1=(10,), w2=(4, 10, 3, 3), b2=(4,),
    )  # fmt: skip


def test_a_block_is_two_layers_and_an_activation():
    layers, _ = layers_of(two_layers())
    block = block_before(layers["y"], layers)
    assert block.first is layers["a"]
    assert block.activation.op_type == "Relu"
    assert block_before(layers["a"], layers) is None


@pytest.mark.parametrize("activation", ["Relu", "Gelu", "Tanh", "Identity"])
def test_every_step_lowers_the_error(activation):
    model = two_layers(activation) if activation != "Identity" else two_layers("Relu")
    dense = private_clone(model)
    layers, _ = layers_of(model)
    second = layers["y"]
    weight = second.weight()
    weight[0, :, : 5 * 9] = 0  # half of the channels are gone
    second.store(weight, second.bias())
    alive = np.arange(10) >= 5
    inputs = np.array([True, True, False])
    before = layers["a"].weight()
    descent = Descent(block_before(second, layers), alive, inputs, 64)
    calibration = images(model, samples=64, shape=(3, 6, 6))
    goals, walk = (Walk(m, calibration, batch_size=16) for m in (dense, model))
    steps = [descent.step("y", goals, walk, relu=False) for _ in range(4)]
    assert all(after <= before for before, after in steps)
    assert steps[-1][1] < 0.95 * steps[0][0]
    after = layers["a"].weight()
    assert not np.array_equal(after, before)
    np.testing.assert_array_equal(after[0, ~alive], before[0, ~alive])
    np.testing.assert_array_equal(after[0, :, -9:], before[0, :, -9:])  # columns of the input that is gone


@pytest.mark.parametrize(
    "name, shape, body, parameters",
    [
        ("y", (2, 4, 5, 5), "y = Conv <group = 2, strides = [2, 1], pads = [1, 0, 1, 2]> (x, w)", {"w": (6, 2, 3, 3)}),
        ("y", (2, 4, 5, 5), "y = Conv <strides = [2, 2], auto_pad = \"SAME_UPPER\"> (x, w)", {"w": (6, 4, 3, 3)}),
        ("y", (2, 4, 5, 5), "y = ConvTranspose <strides = [2, 2], pads = [1, 1, 1, 1]> (x, w)", {"w": (4, 6, 3, 3)}),
        ("y", (7, 4), "y = Gemm <transB = 1, alpha = 2.0> (x, w)", {"w": (6, 4)}),
        ("y", (2, 7, 4), "y = MatMul (x, w)", {"w": (4, 6)}),
    ],
)  # fmt: skip
def test_pulling_back_is_the_adjoint(name, shape, body, parameters):
    """<L x, y> = <x, L* y>."""
    dims = ", ".join(map(str, shape))
    model = graph(f"(float[{dims}] x) => (float[{', '.join('abcd'[: len(shape)])}] y)", body, **parameters)
    layer = layers_of(model)[0][name]
    random = np.random.default_rng(0)
    x = random.normal(size=shape).astype(np.float32)
    forward = Session(model).run({"x": x})["y"]
    y = random.normal(size=forward.shape).astype(np.float32)
    back = layer.pulled_back(y, shape)
    assert float((forward * y).sum()) == pytest.approx(float((x * back).sum()), rel=1e-4)


def test_refined_blocks_are_nearer():
    errors = []
    for blockwise in (False, True):
        model = two_layers(seed=3)
        coupling = analyse(model)
        families, _ = candidates(coupling, layers_of(model)[0], (), refitted=True)
        small = private_clone(model)
        outcome = reconstruct(
            Plan(
                dense=model,
                model=small,
                coupling=coupling,
                families=families,
                removed=[families[0].units[:5]],
                calibration=images(model, shape=(3, 6, 6)),
                mode="ls",
                samples=None,
                threads=1,
                progress=Silent(),
                blockwise=blockwise,
            )
        )
        remove_units(small, coupling, outcome.dead)
        x = np.random.default_rng(9).normal(size=(64, 3, 6, 6)).astype(np.float32)
        one, two = (Session(m).run({"x": x})["y"] for m in (model, small))
        errors.append(float(np.linalg.norm(one - two) / np.linalg.norm(one)))
    assert errors[1] < 0.92 * errors[0]

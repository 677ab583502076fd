"""Mean activations without data, from the statistics that batch normalisation keeps.

Training normalised each channel to mean 0 and variance 1 before scale and shift, so behind a BatchNormalization a
channel has about mean beta and standard deviation |gamma|; taken as normally distributed, behind a Relu as well

    E[max(0, x)] = beta Phi(beta / |gamma|) + |gamma| phi(beta / |gamma|)

A reader of a unit that is cut gets the unit's mean in its bias instead of nothing: b' = b + W_C E[x_C]. The same
moments serve data-free bias correction in Nagel et al., arXiv:1906.04721, section 4.2.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from scipy.stats import norm

from graphopt.analysis import shapes
from graphopt.analysis.dead_values import DeadValues, Floats
from graphopt.analysis.units import Coupling


def batchnorm_means(coupling: Coupling) -> tuple[DeadValues, int]:
    """What readers of removed units should see: means where statistics tell them, else what a zeroed unit leaves.

    Returns:
        The values for `remove_units`, and the number of BatchNormalization nodes that were used.
    """
    values = coupling.dead_values(hypothetical=True)
    means = [(node, _means(node)) for node in coupling.model.graph if node.op_type == "BatchNormalization"]
    used: set[ir.Node] = set()
    for _ in values.every_colour():
        for node, found in means:
            if found is None or 1 not in values.axes(node.outputs[0]):
                continue
            mean, rectified = found
            values.set(node.outputs[0], 1, mean)
            used.add(node)
            for use in node.outputs[0].uses():
                if use.node.op_type == "Relu" and 1 in values.axes(use.node.outputs[0]):
                    values.set(use.node.outputs[0], 1, rectified)
    return values, len(used)


def _means(node: ir.Node) -> tuple[Floats, Floats] | None:
    """Means behind a BatchNormalization and behind a Relu that follows it; None where its parameters are computed."""
    gamma, beta = (shapes.constant(node.inputs[index]) for index in (1, 2))
    if gamma is None or beta is None:
        return None
    mean, deviation = beta.astype(np.float64), np.abs(gamma.astype(np.float64))
    ratio = mean / np.maximum(deviation, 1e-12)
    return mean, np.asarray(mean * norm.cdf(ratio) + deviation * norm.pdf(ratio))

"""Mean activations without data, from the statistics that batch normalisation keeps.

Training normalised each channel to mean 0 and variance 1 before scale and shift, so behind a BatchNormalization a
channel has about mean beta and standard deviation |gamma|; taken as normally distributed, behind a Relu as well

    E[max(0, x)] = beta Phi(beta / |gamma|) + |gamma| phi(beta / |gamma|)

A reader of a unit that is cut gets the unit's mean in its bias instead of nothing: b' = b + W_C E[x_C]. The same
moments serve data-free bias correction in Nagel et al., arXiv:1906.04721, section 4.2.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import norm

from graphopt.analysis import shapes
from graphopt.analysis.dead_values import DeadValues
from graphopt.analysis.units import Coupling


def batchnorm_means(coupling: Coupling) -> tuple[DeadValues, int]:
    """What readers of removed units should see: means where statistics tell them, else what a zeroed unit leaves.

    Returns:
        The values for `remove_units`, and the number of BatchNormalization nodes that were used.
    """
    values = coupling.dead_values(hypothetical=True)
    used = 0
    for node in coupling.model.graph:
        if node.op_type != "BatchNormalization" or 1 not in values.axes(node.outputs[0]):
            continue
        gamma, beta = (shapes.constant(node.inputs[index]) for index in (1, 2))
        if gamma is None or beta is None:
            continue
        mean, deviation = beta.astype(np.float64), np.abs(gamma.astype(np.float64))
        values.set(node.outputs[0], 1, mean)
        used += 1
        ratio = mean / np.maximum(deviation, 1e-12)
        rectified = mean * norm.cdf(ratio) + deviation * norm.pdf(ratio)
        for use in node.outputs[0].uses():
            if use.node.op_type == "Relu" and 1 in values.axes(use.node.outputs[0]):
                values.set(use.node.outputs[0], 1, rectified)
    return values, used

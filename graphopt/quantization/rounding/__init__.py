"""How weights become integers: the interface, rounding to nearest, second-order rounding, corrected biases."""

"""Ranges of activations: from calibration data, from what reads them, from the model alone."""

"""Where two models that should agree part: tensors matched, errors layer by layer."""

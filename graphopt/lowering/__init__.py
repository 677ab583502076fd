"""Lowering: what happens around a backend when a model becomes a bundle, the same for all targets.

`steps.py` is the road: refuse, prepare, let the backend write its artefacts, compare them with the model, describe, put
in place. `options.py` reads what a backend's own options are, `verified.py` runs a bundle beside the model,
`describe.py` makes the manifest, and `readme.py` renders README.md and bench.sh from it.
"""

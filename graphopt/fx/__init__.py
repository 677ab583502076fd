"""torch and back: modules become models, models become trainable modules, decisions about one apply to the other.

torch is an optional extra. The public functions (`graphopt.from_torch`, `to_torch`, `update_weights`, `prune_module`)
import without it and say so when they are called; the other files of this package import it at their head.
"""

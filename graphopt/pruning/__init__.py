"""What structured pruning stands on: layers as matrix products, importance, selection, reconstruction."""

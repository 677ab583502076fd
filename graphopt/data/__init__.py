"""Feeds: where samples come from, whether they fit a model, and the activations they cause."""

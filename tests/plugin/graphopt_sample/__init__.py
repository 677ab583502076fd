"""A sample plug-in for graphopt."""

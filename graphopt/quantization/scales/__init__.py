"""Positive scales per channel that commute with what lies between layers: equalising and smoothing."""

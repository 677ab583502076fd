"""Sparse weights and their factorisations: matrices in, matrices out."""

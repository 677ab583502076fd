"""Formulas of operators, by family: data for `graphopt.rewriting.recognise`."""

"""Weights alone as integers: products from blocks, look-ups, and forms that runtimes fold when they load."""

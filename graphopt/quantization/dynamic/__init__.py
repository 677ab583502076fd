"""Integers whose scales are found as the data arrives: products and LSTMs."""

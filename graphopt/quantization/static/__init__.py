"""Static int8 as QDQ: which nodes work on integers, where the pairs stand, what a target asks of them."""

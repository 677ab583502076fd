"""graphopt: a compiler for trained neural networks."""

"""Which layer gets which number format: times, noise, budgets, and the search over them."""

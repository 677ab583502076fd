"""Times of single layers on a target, measured once and remembered: what a budget of latency is made of."""

"""What quantisation stands on: placement rules, the plan of a QDQ graph, its emission, sensitivity."""

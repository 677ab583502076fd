"""What passes share to rewrite a graph exactly."""

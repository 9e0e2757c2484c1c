"""Experiments: an idealised model, what theory says of it, and what was found; one a file."""

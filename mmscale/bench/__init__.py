"""Benchmarks: the cost of parts of mmscale, side by side with the alternatives."""

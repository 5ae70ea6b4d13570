"""Benchmarks: the cost of parts of mmscale, compared with alternatives."""

"""Measurements: what a part of mmscale costs, side by side with the alternatives."""

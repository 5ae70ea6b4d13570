"""Evaluates and samples from trained checkpoints."""

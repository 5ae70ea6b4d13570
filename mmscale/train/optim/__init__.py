"""Optimizers, how their states are stored in every layout, and the learning rate."""

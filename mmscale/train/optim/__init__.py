"""Optimizers, how their states are stored under every layout, and the learning rate."""

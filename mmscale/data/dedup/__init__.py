"""Finds near-duplicate documents of a prepared data set, and documents that also occur in held-out data."""

"""Finds documents of a prepared data set that are alike, or that are in held-out data too."""

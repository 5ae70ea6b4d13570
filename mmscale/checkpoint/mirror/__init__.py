"""Copies of a run's committed checkpoints in an object store or another file system. No torch."""

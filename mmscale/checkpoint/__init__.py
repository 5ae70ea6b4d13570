"""Checkpoints: their folders, and writing and reading sharded state."""

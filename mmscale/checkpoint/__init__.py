"""Checkpoints: their folders, manifests and digests, and sharded writing and reading of training state."""

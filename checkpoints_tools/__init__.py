"""Tools for existing checkpoints: show, verify, reshard, archive, average, upcycle, convert to Hugging Face.

`mmscale.checkpoint` writes checkpoints during training.
"""

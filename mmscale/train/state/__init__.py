"""The state of a run: what checkpoints store of it, and what the memory tier copies per rank."""

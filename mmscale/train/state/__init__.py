"""The state of a run, the part of it that checkpoints store, and the part that the memory tier copies per rank."""

"""Settings of checkpoints, and the rules between them."""

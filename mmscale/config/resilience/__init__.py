"""Settings of recovery from faults, and the rules between them."""

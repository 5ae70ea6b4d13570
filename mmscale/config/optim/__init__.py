"""Settings of the optimizer and its schedule, and the rules between them."""

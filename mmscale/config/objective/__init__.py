"""Settings of the training objective, and the rules between them."""

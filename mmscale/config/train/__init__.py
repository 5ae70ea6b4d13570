"""Settings of steps, batches, evaluation and loss, and the rules between them."""

"""Settings of the vocabulary, and the rules between them."""

"""Settings of the architecture, and the rules between them."""

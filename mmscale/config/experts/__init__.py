"""Settings of the experts and their routing, and the rules between them."""

"""Settings of the auxiliary routers and their training, and the rules between them."""

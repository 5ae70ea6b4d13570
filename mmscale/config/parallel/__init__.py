"""Settings of the layout over ranks, and the rules between them."""

"""Settings of data preparation and of training data, and the rules between them."""

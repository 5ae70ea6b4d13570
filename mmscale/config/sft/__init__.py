"""Settings of supervised fine-tuning, and the rules between them."""

"""Hugging Face: export with its acceptance check (the gate), import, evaluation and generation from an export."""

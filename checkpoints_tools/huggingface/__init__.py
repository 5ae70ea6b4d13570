"""Hugging Face: export and its gate, import, evaluation and generation from an exported folder."""

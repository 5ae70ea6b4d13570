"""Modalities: convert the content of a document to token ids of one range, and back."""

"""Scoring and drawing with a trained checkpoint, in one process."""

"""Prepares documents as token files, and reads them as modality-balanced micro-batches."""

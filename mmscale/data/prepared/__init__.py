"""Prepares data sets: documents are converted to token files on disk once."""

"""Data sets that can be prepared without own files."""

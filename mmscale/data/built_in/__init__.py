"""Data sets that can be prepared without files of the user."""

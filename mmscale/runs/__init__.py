"""Reads the files of a run, for status, reports and comparisons. Imports no torch."""

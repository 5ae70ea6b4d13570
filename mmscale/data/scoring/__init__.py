"""Scores of documents, and the weights computed from them: how often training reads each document."""

"""Scores of documents, and what follows from them: how often training reads each document."""

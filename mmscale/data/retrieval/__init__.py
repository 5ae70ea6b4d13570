"""Finds the neighbours of documents: embeddings, nearest documents, tables next to a prepared data set."""

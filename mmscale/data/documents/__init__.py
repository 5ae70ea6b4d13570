"""Documents: their schema, and readers of every file format."""

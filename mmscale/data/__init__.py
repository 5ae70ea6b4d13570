"""Documents in, modality-balanced micro-batches out."""

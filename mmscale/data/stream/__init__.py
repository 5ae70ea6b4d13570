"""The stream of packed, balanced micro-batches from prepared data sets, accessible at any position."""

"""Going on in spite of faults."""

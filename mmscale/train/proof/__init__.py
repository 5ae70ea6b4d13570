"""`mmscale verify-layout`: compares a few steps on synthetic batches with one process, tensor by tensor."""

"""`mmscale verify-layout`: a few steps on synthetic batches, compared with one process tensor by tensor."""

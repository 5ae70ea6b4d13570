"""Training: loop, step, loss, optimizer, metrics. run.py assembles the parts of an attempt."""

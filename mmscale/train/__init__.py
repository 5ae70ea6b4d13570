"""Training: loop, step, loss, optimizer, metrics; run.py is the one place that puts the parts together."""

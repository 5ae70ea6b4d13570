"""What SLURM itself runs: the batch script, checks before a job, and a small local cluster for tests.

Submitting jobs is the business of `launch`.
"""

"""What SLURM itself runs: the batch script and checks before a job; local/ is a small cluster for tests.

Submitting jobs is the business of `launch`.
"""

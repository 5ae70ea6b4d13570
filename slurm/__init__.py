"""Programs that SLURM runs: the batch script and checks before a job. local/ is a small cluster for tests.

`launch` submits jobs.
"""

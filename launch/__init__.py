"""Jobs on a SLURM cluster: launch, status, logs, stop, resume.

This package runs on login nodes and imports no torch.
"""

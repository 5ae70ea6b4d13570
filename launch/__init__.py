"""Jobs on a SLURM cluster: submit, status, logs, stop, resume.

Runs on login nodes, so nothing in here imports torch.
"""

"""A real SLURM on this machine, for tests and for trying `mmscale launch`. Part of a checkout only."""

"""Where am I running: ranks, devices, process groups, and megatron-core on CPU."""

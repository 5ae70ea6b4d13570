"""The runtime environment: ranks, devices, process groups, megatron-core on CPU, and robust writing."""

"""Fault tolerance: anomaly policy, diverged replicas, snapshots in memory, leases, stop requests, hang detection."""

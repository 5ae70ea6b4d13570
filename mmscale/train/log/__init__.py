"""Logs of a run: metrics, events, progress lines and layer metrics, and the sinks that receive them."""

"""Logs of a run: metrics, events, progress lines and layer figures, and the sinks that receive them."""

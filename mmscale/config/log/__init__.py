"""Settings of logs, sinks and the profiler."""

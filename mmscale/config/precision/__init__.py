"""Settings of number formats, the rules between them, and FP8's requirements."""

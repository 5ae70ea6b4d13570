"""What a run's files say, for those who read them. Imports no torch."""

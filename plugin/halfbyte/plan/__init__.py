"""Before training: is this machine ready, and what would a launch run on it."""

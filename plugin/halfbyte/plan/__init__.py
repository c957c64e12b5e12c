"""Before training: is this machine ready, and what would a launch file run on it."""

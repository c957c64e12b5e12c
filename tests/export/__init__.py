"""What is made of runs: merged models, and checkpoints in four bits."""

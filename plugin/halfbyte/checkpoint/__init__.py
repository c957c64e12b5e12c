"""Checkpoints that survive anything: atomic saves, verified and exact resumes, signals and guards.

Nothing is imported here: `halfbyte verify` needs no torch.
"""

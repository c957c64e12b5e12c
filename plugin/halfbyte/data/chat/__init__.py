"""The chat template of a run: its tokens and turns, what it renders, and what would forge a turn in it."""

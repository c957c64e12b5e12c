"""Four recipes of a third party: its own package, which only uses what halfbyte exports."""

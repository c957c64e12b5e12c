"""The commands of `halfbyte`, one module each."""

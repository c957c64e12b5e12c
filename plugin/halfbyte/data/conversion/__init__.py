"""Rows of other systems, recognised by their shape and turned into TRL's columns."""

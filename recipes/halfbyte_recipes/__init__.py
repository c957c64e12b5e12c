"""The recipes that ship with halfbyte; each registers through an entry point, as a third party's would."""

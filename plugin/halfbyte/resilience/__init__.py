"""What a run survives: signals, steps that are not finite, a lack of memory, ranks that fail or hang."""

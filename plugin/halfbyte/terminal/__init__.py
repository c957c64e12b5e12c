"""What is printed: words and progress, without secrets or control characters, on streams that never end a run."""

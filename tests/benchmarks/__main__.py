"""`python -m tests.benchmarks`, as `make bench` runs it: the SFT steps."""

from tests.benchmarks.steps import main

main("sft")

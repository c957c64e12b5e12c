"""`python -m tests.benchmarks`, as `make bench` runs it: the SFT steps."""

from tests.benchmarks.sft import main

main()

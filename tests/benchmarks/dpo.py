"""DPO steps against plain TRL: `python -m tests.benchmarks.dpo`, see :mod:`tests.benchmarks.steps`."""

from tests.benchmarks.steps import main

if __name__ == "__main__":
    main("dpo")

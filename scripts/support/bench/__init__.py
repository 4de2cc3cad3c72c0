"""The benchmarks behind ``scripts/bench``: each yields figures, measured beside their yardsticks in the same run."""

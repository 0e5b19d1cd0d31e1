"""Benchmarks: figures with their peers, measured in the same run. `make bench`."""

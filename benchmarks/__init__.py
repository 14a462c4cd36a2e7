"""Timings: `python -m benchmarks.throughput`, `python -m benchmarks.peers`.  Not tests."""

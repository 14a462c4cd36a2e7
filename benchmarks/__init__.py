"""Timings and counts: throughput, peers, launches; gpu.sh runs what needs a GPU.  Not tests."""

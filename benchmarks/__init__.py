"""Timings and counts: throughput, peers, launches; gpu runs what needs a GPU.  Not tests."""

"""Speed: throughput, also against lightly; gpu runs all that needs a GPU.  Not tests."""

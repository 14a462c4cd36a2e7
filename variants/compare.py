"""`python -m variants.compare` was replaced by `python reproduce.py --methods`."""

import shlex
import sys

METHODS = "byol simsiam simclr barlow_twins vicreg moco_v3 dino"

if __name__ == "__main__":
    words = shlex.join(sys.argv[1:])
    sys.exit(f"error: type: python reproduce.py --methods {METHODS} {words}")

"""`python -m variants.compare` is `reproduce.py --methods` now."""

import shlex
import sys

from core.errors import UserError, one_line_errors

METHODS = "byol simsiam simclr barlow_twins vicreg moco_v3 dino"


def main(argv: list[str] | None = None) -> None:
    """One line that says what to type."""
    with one_line_errors():
        words = shlex.join(sys.argv[1:] if argv is None else argv)
        raise UserError(f"type: python reproduce.py --methods {METHODS} {words}".rstrip())


if __name__ == "__main__":
    main()

"""``python -m ring_mlx`` is ``ring-mlx``."""

import sys

from ring_mlx.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""``python -m ring_mlx`` is ``ring-mlx``."""

import os
import sys
from pathlib import Path

# With -m Python looks for modules in the present folder first, which may be a checkpoint's and hold a json.py.
if not getattr(sys.flags, "safe_path", False) and Path(__file__).parents[1] != Path.cwd():
    sys.path[:] = [p for p in sys.path if p != os.getcwd()]

from ring_mlx.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""``python -m ring_mlx.mlx_lm_plugin`` is ``ring-mlx mlx-lm``."""

import sys

from ring_mlx.cli import main

if __name__ == "__main__":
    sys.exit(main(["mlx-lm", *sys.argv[1:]]))

"""``python convert.py`` is ``ring-mlx convert``; this file is a door and not part of the wheel."""

import sys

from ring_mlx.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))

"""``ring-mlx mlx-lm``: a command of mlx-lm, with our model where the checkpoint is one of ours."""

from __future__ import annotations

import argparse

from ring_mlx import mlx_lm_plugin


def run(args: argparse.Namespace) -> int:
    """Run it; returns the exit code."""
    mlx_lm_plugin.run(args.name, args.arguments)
    return 0

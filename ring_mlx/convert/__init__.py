"""Checkpoints to the mlx-community form, quantised or not, piece by piece.

Modules, each using those above it:

    settings       bits, groups, modes and recipes          matrices       formats of sources as float rows
    fit            float rows to packed form                remote         the hub
    sources        a checkpoint as matrices
    plan           what is written where                    writer         shards, manifest, resume, verify
    expert_shards  experts side by side                     folder_files   config, index, card
    job            the conversion itself
    sizes          the table of a dry run                   streams        a model one layer at a time
    report         divergence of a result from its source
"""

from ring_mlx.convert.job import convert, convert_plan, describe
from ring_mlx.convert.writer import verify

__all__ = ["convert", "convert_plan", "describe", "verify"]

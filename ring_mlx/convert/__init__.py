"""Checkpoints to the mlx-community form, quantized or not, a few rows at a time.

Modules, each using those above it:

    recipes        bits, groups and modes; which module gets which
    grids          codes in words                           matrices       formats of sources as float rows
    integers       GPTQ, compressed-tensors                 formats        the table of formats
    fit            float rows to MLX's packed form
    remote         the hub                                  sources        a checkpoint as matrices
    plan           what is written where                    options        what decides the result
    encoding       rows as they are stored                  timing         how long it will take
    shard_files    shards written piece by piece            writer         partial folder, manifest, resume, verify
    folder_files   config, index, card                      conversion     the conversion itself
    streams        a model one layer at a time              report         divergence of a result from its source
    second_order   matrices for known inputs                activations    a layer's matrices in turn
    calibration    a model's layers in turn                 calibration_time  how long that will take
    sensitivity    what each module's quantization changes  allocation     bits by module for a size
    target         a recipe for a size
"""

from ring_mlx.convert.conversion import convert, convert_plan, describe
from ring_mlx.convert.options import Options
from ring_mlx.convert.writer import verify

__all__ = ["Options", "convert", "convert_plan", "describe", "verify"]

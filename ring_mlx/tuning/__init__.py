"""What is fast on this machine, timed with the model itself; kept beside the proofs of kernels, used by `metal_kernels`.

Modules, each using those above it:

    race       which of several ways is the fastest beyond the noise
    workloads  a model's decode step and prompt as work to time
    autotune   all choices in order within seconds, kept and applied
    buffers    operations a command buffer, which MLX reads once a process
    table      what was found, as text
"""

"""Names that the Metal language fixes: address spaces, kernel attributes and the order MLX lists them in."""

from __future__ import annotations

ADDRESS_SPACES = frozenset({"device", "constant", "threadgroup"})

# Kernel parameters that are filled in by the hardware, in the order in which MLX writes them.
KERNEL_ATTRIBUTES = {
    "dispatch_quadgroups_per_threadgroup": "uint",
    "dispatch_simdgroups_per_threadgroup": "uint",
    "dispatch_threads_per_threadgroup": "uint3",
    "grid_origin": "uint3",
    "grid_size": "uint3",
    "quadgroup_index_in_threadgroup": "uint",
    "quadgroups_per_threadgroup": "uint",
    "simdgroup_index_in_threadgroup": "uint",
    "simdgroups_per_threadgroup": "uint",
    "thread_execution_width": "uint",
    "thread_index_in_quadgroup": "uint",
    "thread_index_in_simdgroup": "uint",
    "thread_index_in_threadgroup": "uint",
    "thread_position_in_grid": "uint3",
    "thread_position_in_threadgroup": "uint3",
    "threadgroup_position_in_grid": "uint3",
    "threadgroups_per_grid": "uint3",
    "threads_per_grid": "uint3",
    "threads_per_simdgroup": "uint",
    "threads_per_threadgroup": "uint3",
}
OTHER_ATTRIBUTES = frozenset(
    [
        *("buffer", "texture", "threadgroup", "id", "function_constant"),
        *("kernel", "host_name", "visible", "max_total_threads_per_threadgroup"),
    ]
)
METAL_ATTRIBUTES = OTHER_ATTRIBUTES | KERNEL_ATTRIBUTES.keys()
# Attributes of C++ that both languages share.
CPP_ATTRIBUTES = frozenset(
    ["clang", "deprecated", "fallthrough", "gnu", "likely", "maybe_unused", "nodiscard", "noreturn", "unlikely"]
)

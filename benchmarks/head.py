"""The line that says what was measured, and on which machine."""

from ring_mlx.bench.machine import describe


def print_head(*words: object) -> dict[str, str]:
    """Say what is measured, and on which machine; returns what describes the machine."""
    machine = describe()
    print(", ".join([machine["device"], f"mlx {machine['mlx']}", *map(str, words)]))
    return machine

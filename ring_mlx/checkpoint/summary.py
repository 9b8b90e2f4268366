"""What a folder's checkpoint takes and whether it fits; reads config.json, the index and files' sizes, never weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ring_mlx.checkpoint.shards import INDEX, look_up
from ring_mlx.errors import RingError
from ring_mlx.model import memory
from ring_mlx.model.config import LINEAR_TYPES, SOFTMAX_TYPES, RingConfig, without_unknown
from ring_mlx.model.quantization import CONVERTIBLE, bits_of, foreign_method, with_settings
from ring_mlx.system.regular_files import MIB, is_litter, read_json

MOST_BYTES, MOST_ENTRIES = 4 * MIB, 20_000


@dataclass(frozen=True)
class Summary:
    """A checkpoint: ``tokens`` of one conversation fit beside its weights, 0 if it does not fit, None if that is not known.

    ``needed_bytes`` are those of its weights and a short conversation; ``trouble`` says why it cannot be loaded.
    """

    bits: int | None
    weight_bytes: int
    tokens: int | None = None
    needed_bytes: int = 0
    room_bytes: int = 0
    trouble: str = ""


def summary_of(folder: Path) -> Summary | None:
    """Look at a folder of any kind; None if it has no Ring checkpoint, or one whose config.json is damaged or too long."""
    try:
        raw = with_settings(read_json(folder / "config.json", most_bytes=MOST_BYTES))
        if raw.get("model_type") not in LINEAR_TYPES + SOFTMAX_TYPES:
            return None
        size = _weight_bytes(folder)
    except (RingError, OSError):
        return None
    return None if size is None else _judged(folder, raw, size)


def _judged(folder: Path, raw: Mapping[str, Any], size: int) -> Summary:
    bits = bits_of(raw)
    try:
        missing = len(look_up(folder)[1]) if _is_short(folder / INDEX) else 0
        method = foreign_method(raw)
        if missing or method:
            return Summary(
                bits,
                size,
                trouble=f"{missing} {'file' if missing == 1 else 'files'} missing"
                if missing
                else f"{method}: {'convert it first' if method in CONVERTIBLE else 'not supported'}",
            )
        config = RingConfig.from_dict(without_unknown(raw))
    except (RingError, OSError):
        return Summary(bits, size, trouble="damaged")
    room = memory.budget_bytes()
    tokens = memory.tokens_beside(config, size, room)
    return Summary(bits, size, tokens, size + memory.extra_bytes(config), room)


def _weight_bytes(folder: Path) -> int | None:
    """The sizes of a folder's safetensors files, of its first entries if there are very many; None without such files."""
    sizes = []
    with os.scandir(folder) as entries:
        for entry in islice(entries, MOST_ENTRIES):
            if entry.name.endswith(".safetensors") and not is_litter(Path(entry.name)) and entry.is_file():
                sizes.append(entry.stat().st_size)
    return sum(sizes) if sizes else None


def _is_short(index: Path) -> bool:
    return not index.exists() or index.stat().st_size <= MOST_BYTES

"""Ring models in the hub's cache, and which of the known ones this memory holds; reads configs, never weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import constants

from ring_mlx.bench.shapes import FLASH, MINI
from ring_mlx.checkpoint.hub import cached_models
from ring_mlx.checkpoint.shards import look_up, safetensors_in
from ring_mlx.doctor.finding import NOTE, OK, Finding
from ring_mlx.errors import RingError
from ring_mlx.experts import recommend_cache_bytes
from ring_mlx.model import memory
from ring_mlx.model.config import LINEAR_TYPES, SOFTMAX_TYPES, RingConfig, read_config
from ring_mlx.model.quantization import foreign_method
from ring_mlx.system.regular_files import read_json

SECTION_CACHE, SECTION_FIT = "hub cache", "what fits"
KNOWN = {"Ring-mini-linear-2.0": MINI, "Ring-flash-linear-2.0": FLASH}
BITS = (16, 8, 6, 5, 4, 3)


class Fit(NamedTuple):
    """A model's size in so many bits, and how many tokens of one conversation fit beside it; 0 where it does not fit."""

    bits: int
    weight_bytes: int
    tokens: int


def check() -> list[Finding]:
    """Look at the cache, then at what fits."""
    room = memory.budget_bytes()
    return [*cached(room), *(fit_finding(name, RingConfig.from_dict(raw), room) for name, raw in KNOWN.items())]


def cached(room: int) -> list[Finding]:
    """The cache's Ring models, each with whether it is whole, can be loaded, and fits into ``room`` bytes."""
    where = Path(constants.HF_HUB_CACHE)
    if not where.is_dir():
        return [Finding(SECTION_CACHE, "models", OK, f"{where} is not there yet")]
    found = [_judged(name, folder, room) for name, folder in cached_models(is_whole=False).items() if _is_ring(folder)]
    return found or [Finding(SECTION_CACHE, "models", OK, f"no Ring model in {where} yet")]


def fits(config: RingConfig, room: int) -> list[Fit]:
    """Every width of `BITS`, by the estimates that refuse to load what does not fit."""
    found = []
    for bits in BITS:
        weights = memory.size_in_bits(config, bits)
        found.append(Fit(bits, weights, memory.tokens_beside(config, weights, room)))
    return found


def known_fits() -> dict[str, list[Fit]]:
    """The known models, each with its widths on this machine, the widest first."""
    room = memory.budget_bytes()
    return {name: fits(RingConfig.from_dict(raw), room) for name, raw in KNOWN.items()}


def fit_finding(name: str, config: RingConfig, room: int) -> Finding:
    """A known model's widths as one line."""
    all_fits = fits(config, room)
    data = [f._asdict() for f in all_fits]
    streamed = recommend_cache_bytes(config, room)
    on_disk = f"at 4 bits --expert-cache-bytes {streamed / memory.GB:.1f}GB" if streamed else ""
    good = [f for f in all_fits if f.tokens]
    if good:
        seen = "; ".join(f"{f.bits} bits {f.weight_bytes / memory.GB:.1f} GB, {f.tokens:,} tokens" for f in good)
        seen += _after_raising(config, [f for f in all_fits if not f.tokens])
        seen += f"; {on_disk} keeps the rest on disk" if on_disk else ""
        return Finding(SECTION_FIT, name, OK, seen, data=data)
    least = all_fits[-1].weight_bytes + memory.extra_bytes(config)
    seen = f"no width fits into {room / memory.GB:.1f} GB; {all_fits[-1].bits} bits want {least / memory.GB:.1f} GB"
    remedy = f"{on_disk}, which keeps experts on disk" if on_disk else "a machine with more memory, or a smaller model"
    seen += _after_raising(config, all_fits)
    return Finding(SECTION_FIT, name, NOTE, seen, remedy, data)


def _after_raising(config: RingConfig, unfit: Sequence[Fit]) -> str:
    """The widest of these that a raised working set would hold, and the command that raises it; "" if none."""
    for f in unfit:
        if command := memory.wired_limit_command(f.weight_bytes + memory.extra_bytes(config)):
            return f"; {f.bits} bits {f.weight_bytes / memory.GB:.1f} GB after {command}"
    return ""


def _is_ring(folder: Path) -> bool:
    try:
        kind = read_json(folder / "config.json").get("model_type")
    except RingError:
        return False
    return kind in LINEAR_TYPES + SOFTMAX_TYPES


def _judged(name: str, folder: Path, room: int) -> Finding:
    """Whether this snapshot can be loaded, and else why not."""
    size = sum(f.stat().st_size for f in safetensors_in(folder) if f.is_file())
    seen, data = f"{size / memory.GB:.1f} GB", {"path": str(folder), "bytes": size}
    try:
        config, raw = read_config(folder)
        shards, names, _ = look_up(folder)
        missing = len(names) if shards else 1
        if missing:
            remedy = f"run any command with --model {name}; the download goes on where it stopped"
            return Finding(SECTION_CACHE, name, NOTE, f"{seen}, {missing} files of weights missing", remedy, data)
        method = foreign_method(raw)
        if method:
            remedy = f"ring-mlx convert --model {name} --mlx-path FOLDER"
            return Finding(SECTION_CACHE, name, NOTE, f"{seen}, in the form {method!r}", remedy, data)
        memory.check_fit(config, size, name, room)
    except RingError as e:
        said, _, remedy = str(e).partition("] ")[2].rpartition("; ")
        return Finding(SECTION_CACHE, name, NOTE, f"{seen}; {said}", remedy, data)
    return Finding(SECTION_CACHE, name, OK, f"{seen}, fits", data=data)

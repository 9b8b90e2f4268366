"""The models that are on this machine: folders, the hub's cache, the packaged toy."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ring_mlx import RingError, cached_models, read_json

TOY_NAME = "toy"
FAMILY = "bailing"


@dataclass(frozen=True)
class Found:
    """A model that can be chosen; ``path`` None is the packaged toy."""

    name: str
    path: str | None
    remark: str


def found_models(folders: tuple[str, ...] = (".", "~/models")) -> list[Found]:
    """The toy, and Ring-linear checkpoints in the given folders and in the hub's cache."""
    local = [f for folder in folders for f in _checkpoints(Path(os.path.expanduser(folder)))]
    cached = [Found(n, n, f"in the hub's cache, {_remark(p)}") for n, p in cached_models().items() if _is_ring(p)]
    return [Found(TOY_NAME, None, "packaged, for trying things out"), *local, *cached]


def _checkpoints(folder: Path) -> list[Found]:
    try:
        candidates = [folder, *sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))]
    except OSError:
        return []
    return [Found(p.resolve().name, str(p.resolve()), _remark(p)) for p in candidates if _is_ring(p)]


def _config(folder: Path) -> dict[str, object]:
    try:
        return read_json(folder / "config.json")
    except RingError:
        return {}


def _is_ring(folder: Path) -> bool:
    kind = str(_config(folder).get("model_type", ""))
    return kind.startswith(FAMILY) and any(folder.glob("*.safetensors"))


def _remark(folder: Path) -> str:
    config = _config(folder)
    quantized = config.get("quantization") or config.get("quantization_config")
    bits = f"{quantized['bits']}-bit, " if isinstance(quantized, dict) and "bits" in quantized else ""
    size = sum(p.stat().st_size for p in folder.glob("*.safetensors")) / 1e9
    return f"{bits}{size:.1f} GB" if size >= 0.1 else f"{bits}{size * 1e3:.0f} MB"

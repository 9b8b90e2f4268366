"""Everything of a converted folder but the shards: index, config, tokenizer and model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ring_mlx import __version__
from ring_mlx.checkpoint.shards import INDEX
from ring_mlx.checkpoint.weights import dtype_name
from ring_mlx.convert.plan import Plan, by_part
from ring_mlx.convert.shard_files import streamed_names
from ring_mlx.convert.sources import Source
from ring_mlx.system.files import write_text
from ring_mlx.system.regular_files import is_litter

COPIED = (
    *("tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template*", "additional_chat_templates/*.jinja", "generation_config.json", "LICENSE*"),
)
DROPPED_KEYS = ("quantization", "quantization_config", "dtype", "_name_or_path")


@dataclass(frozen=True)
class DecayChoice:
    """The ``decay_layer_offset`` for config.json, None to leave it, and lines for the model card that say why.

    ``is_open`` says that the source could not be checked, so that the result may be.
    """

    offset: int | str | None
    lines: tuple[str, ...]
    is_open: bool = False

    @property
    def section(self) -> str:
        """Its part of the model card."""
        return "## Decay\n\n" + "".join(f"    {line}\n" for line in self.lines) + "\n"


def write_files(folder: Path, source: Source, plan: Plan, card: str, decay: DecayChoice | None) -> set[str]:
    """Write everything but the shards, with ``card`` as README.md; returns the files' names."""
    texts = {
        INDEX: _json(_index(plan)),
        "config.json": _json(config(source, plan, decay)),
        "README.md": card,
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    names = set(texts)
    for pattern in COPIED:
        for file in source.folder.glob(pattern):
            if file.is_file() and not is_litter(file) and not file.name.endswith(".safetensors"):
                name = str(file.relative_to(source.folder))
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(file, folder / name)
                names.add(name)
    return names


def config(source: Source, plan: Plan, decay: DecayChoice | None) -> dict[str, Any]:
    """The source's config.json with our dtype, quantization and decay, sorted as mlx-lm writes it."""
    raw = {k: v for k, v in source.raw.items() if k not in DROPPED_KEYS}
    raw["torch_dtype"] = dtype_name(plan.dtype)
    if plan.quantization is not None:
        raw["quantization"] = raw["quantization_config"] = plan.quantization
    if decay is not None and decay.offset is not None:
        raw["decay_layer_offset"] = decay.offset
    return dict(sorted(raw.items()))


def card(
    source: Source, plan: Plan, options: Mapping[str, Any], decay: DecayChoice | None, notes: Sequence[str]
) -> str:
    """The README.md of the result: how it was made, what is in it, and lines on what differs from the source."""
    is_repo = source.repo is not None or source.name.count("/") == 1
    base = f"base_model: {source.name}\n" if is_repo else ""
    given = ", ".join(f"{k} {v}" for k, v in options.items() if v not in (None, False, [], ()))
    rows = "".join(f"| {part} | {n:,} | {8 * size / n:.2f} | {size:,} |\n" for part, n, size in by_part(plan))
    noted = "".join(f"- {note}\n" for note in notes) + "\n" if notes else ""
    decay_text = decay.section if decay is not None else ""
    return f"""---
library_name: mlx
pipeline_tag: text-generation
tags:
- mlx
- ring-linear
{base}---
# {source.name.rpartition("/")[2]} for MLX

Converted from {source.name} by ring-mlx {__version__} ({given or "no options"}).

| part | weights | bits a weight | bytes |
|---|---:|---:|---:|
{rows}
{noted}    ring-mlx chat --model FOLDER_OR_REPOSITORY

{decay_text}`conversion.json` holds the SHA-256 of every file: `ring-mlx convert --verify --mlx-path FOLDER`.
"""


def _index(plan: Plan) -> dict[str, Any]:
    names: dict[str, str] = {}
    for shard, outputs in plan.shards.items():
        stored = [t for o in outputs for t in o.stored]
        found = streamed_names(stored) if shard in plan.streamed else [t.name for t in stored]
        names |= dict.fromkeys(found, shard)
    total = {"total_size": plan.nbytes, "total_parameters": sum(o.count for o in plan.outputs)}
    return {"metadata": total, "weight_map": dict(sorted(names.items()))}


def _json(value: object) -> str:
    return json.dumps(value, indent=4, ensure_ascii=False) + "\n"

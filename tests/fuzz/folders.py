"""Model folders to damage: the packaged toy by links, with the changes that a test wants."""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from ring_mlx import demo_model_path

CONFIG, GENERATION, TOKENIZER, TOKENIZER_CONFIG, TEMPLATE, WEIGHTS, INDEX = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors",
    "model.safetensors.index.json",
)


@contextmanager
def folder(files: Mapping[str, Any] | None = None) -> Iterator[Path]:
    """The toy with other files: bytes, text, JSON, or None for one that is left out."""
    with tempfile.TemporaryDirectory() as made:
        path = Path(made) / "model"
        path.mkdir()
        for source in demo_model_path().iterdir():
            (path / source.name).symlink_to(source)
        for name, content in (files or {}).items():
            put(path / name, content)
        yield path


def put(file: Path, content: Any) -> None:
    """Replace a file of a folder; what it links to stays."""
    if file.is_symlink() or file.exists():
        file.unlink()
    if content is None:
        return
    if not isinstance(content, (bytes, str)):
        content = json.dumps(content)
    file.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)


def own_copy(file: Path) -> None:
    """Make a linked file one of the folder's own."""
    source = file.resolve()
    file.unlink()
    shutil.copyfile(source, file)


@cache
def _text(name: str) -> str:
    return (demo_model_path() / name).read_text(encoding="utf-8")


def toy_json(name: str) -> dict[str, Any]:
    """A JSON file of the toy, to be changed."""
    return dict(json.loads(_text(name)))


@cache
def _weights() -> tuple[str, bytes]:
    raw = (demo_model_path() / WEIGHTS).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return raw[8 : 8 + length].decode(), raw[8 + length :]


def header() -> dict[str, Any]:
    """The header of the toy's weights, to be changed."""
    return dict(json.loads(_weights()[0]))


def data() -> bytes:
    """The data of the toy's weights."""
    return _weights()[1]


def safetensors(head: Any, body: bytes | None = None, length: int | None = None) -> bytes:
    """A safetensors file of a header, JSON or bytes, that may lie about its length."""
    raw = head if isinstance(head, bytes) else json.dumps(head).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw) if length is None else length) + raw + (data() if body is None else body)

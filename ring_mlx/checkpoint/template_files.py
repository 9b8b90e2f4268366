"""Where a checkpoint keeps its chat templates, and which of them counts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ring_mlx.errors import TokenizerError
from ring_mlx.system.regular_files import is_litter, read_bounded, read_json

MAX_TEMPLATE = 1 << 20


def templates_of(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates of a checkpoint by name; "default" is for purposes without an own one. Blank ones are left out.

    A later place replaces an earlier one: tokenizer_config.json (``settings``), chat_template.json,
    additional_chat_templates. As in transformers, chat_template.jinja replaces all of the first two. Raises a
    TokenizerError if one is not text.
    """
    found = _by_name(settings.get("chat_template"), folder / "tokenizer_config.json")
    path = folder / "chat_template.json"
    if path.exists():
        found |= _by_name(read_json(path, TokenizerError).get("chat_template"), path)
    named = {
        f.name.removesuffix(".jinja"): f for f in folder.glob("additional_chat_templates/*.jinja") if not is_litter(f)
    }
    if default := _jinja(folder / "chat_template.jinja"):
        found = {"default": default}
    return found | {name: text for name, file in named.items() if (text := _jinja(file))}


def _jinja(file: Path) -> str:
    """The template in a file; empty if there is no file."""
    try:
        text = read_bounded(file, MAX_TEMPLATE * 4, TokenizerError).decode()
    except FileNotFoundError:
        return ""
    except UnicodeDecodeError as e:
        raise TokenizerError(f"{file} is not text ({e}); download it again.") from None
    return text if text.strip() else ""


def _by_name(given: object, file: Path) -> dict[str, str]:
    """Templates in JSON: a text, texts by name, or a list of objects with name and template."""
    if isinstance(given, list) and all(isinstance(t, Mapping) for t in given):
        pairs = [(t.get("name"), t.get("template")) for t in given]
    else:
        pairs = list(given.items()) if isinstance(given, Mapping) else [("default", given)] * (given is not None)
    if not all(isinstance(part, str) for pair in pairs for part in pair):
        raise TokenizerError(
            f"chat_template in {file} is neither a text nor a list of named templates; correct it, or download the file "
            "again."
        )
    return {name: template for name, template in pairs if template.strip()}

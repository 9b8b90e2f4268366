"""The checkpoint's tokenizer through mlx-lm's wrapper, with every stop token that its files name.

Every tokenizer is made by `make_tokenizer`, which runs no code of a checkpoint.
"""

from __future__ import annotations

import gc
import pkgutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_lm import chat_templates, tool_parsers
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tokenizer_utils import load as load_wrapper

from ring_mlx.checkpoint.template_files import templates_of
from ring_mlx.checkpoint.tokenizer_check import check_tokenizer
from ring_mlx.checkpoint.vocabulary import check_rows, know_all_ids
from ring_mlx.errors import TokenizerError
from ring_mlx.generation import templates
from ring_mlx.model.config_values import MOST_INTEGER, shown
from ring_mlx.system.regular_files import check_small_files, read_json, without_litter

ROLE_END = "<|role_end|>"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
# transformers gives this type its plain class, which is what tokenizer.json says. Without a type it would look for a
# class or a program that the checkpoint names, and ask at a terminal whether to run it.
PLAIN = {"tokenizer_type": "olmo2", "trust_remote_code": False, "local_files_only": True}
# Text of many kinds, which a tokenizer must take without an error before it is given a prompt.
PROBE = "Hello, world!\n\n  123 + 4567 = <b>\u00e9\u4f60\U0001f600</b>\x00\t'S "
# What mlx-lm imports by a name in tokenizer_config.json, and where from.
NAMED_MODULES = {"tool_parser_type": tool_parsers, "chat_template_type": chat_templates}


def load_tokenizer(folder: Path) -> TokenizerWrapper:
    """The tokenizer of a checkpoint folder, in mlx-lm's wrapper; errors as `make_tokenizer`.

    It stops on the union of ``eos_token_id`` in config.json and generation_config.json, the tokenizer's own, and
    ``<|role_end|>`` if it is in the vocabulary: config.json alone names only ``<|endoftext|>``.
    """
    return make_tokenizer(folder, eos_token_ids=sorted(_named_eos(folder)))


def make_tokenizer(
    folder: Path,
    options: Mapping[str, Any] | None = None,
    eos_token_ids: list[int] | int | None = None,
    defaults: dict[str, Any] | None = None,
) -> TokenizerWrapper:
    """mlx-lm's wrapper around tokenizer.json (or tokenizer.model); code of the checkpoint is never run.

    Same contract as `mlx_lm.tokenizer_utils.load`, and it also stops on ``<|role_end|>``. Raises TokenizerError if the
    files are missing or unreadable, the tokenizer exists as code only, or it makes an id for which the model has no row
    (``vocab_size`` in config.json); ConfigError if config.json is not JSON.
    """
    check_small_files(folder, TokenizerError)
    settings_file = folder / "tokenizer_config.json"
    settings = read_json(settings_file, TokenizerError) if settings_file.is_file() else {}
    _check_files(folder, settings)
    named = templates_of(folder, settings)
    _check_named_modules(folder, settings)
    with _in_library(folder):
        if (folder / "tokenizer.json").is_file():
            check_tokenizer(folder / "tokenizer.json")
        templates.warm()
        with without_litter(folder) as clean:
            tokenizer = load_wrapper(clean, {**(options or {}), **PLAIN}, eos_token_ids, defaults)
        if named:
            tokenizer.has_chat_template = True
            tokenizer.chat_template = named["default"] if set(named) == {"default"} else named
        elif tokenizer._chat_template is None:
            tokenizer.has_chat_template = False
        vocabulary, rows = tokenizer.get_vocab(), _rows(folder)
        know_all_ids(tokenizer, vocabulary, rows or 0)
        tokenizer.decode(tokenizer.encode(PROBE))
    if ROLE_END in vocabulary:
        tokenizer.eos_token_ids = tokenizer.eos_token_ids | {vocabulary[ROLE_END]}
    if rows is not None:
        check_rows(tokenizer, vocabulary, rows, str(folder))
    return tokenizer


@contextmanager
def _in_library(folder: Path) -> Iterator[None]:
    """Turn what transformers and its native library raise, or panic with, into one line, a TokenizerError.

    The garbage collection is paused: it would take a fifth of the time to look at hundreds of thousands of new strings.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    except (KeyboardInterrupt, SystemExit, TokenizerError):
        raise
    except BaseException as e:  # noqa: BLE001 a panic is no Exception
        raise TokenizerError(
            f"the tokenizer in {folder} cannot be read ({shown(str(e), 1000)}); download it again."
        ) from None
    finally:
        if was_on:
            gc.enable()


def _check_files(folder: Path, settings: Mapping[str, Any]) -> None:
    """Check that there is a tokenizer besides the code that settings may name, such as ``evil.Tokenizer``."""
    named = settings.get("auto_map")
    if isinstance(named, Mapping):
        named = named.get("AutoTokenizer")
    named = named if isinstance(named, list) else [named]
    code = ", ".join(dict.fromkeys(str(n) for n in named if n is not None))
    is_there = any((folder / name).is_file() for name in TOKENIZER_FILES)
    if code and is_there:
        warnings.warn(
            f"[tokenizer] tokenizer_config.json in {folder} names code of its own ({code}), which is never run; the "
            "tokenizer file is read as it stands.",
            stacklevel=4,
        )
    elif code:
        raise TokenizerError(
            f"tokenizer_config.json in {folder} asks to run code of its own ({code}), which is never done, and there "
            "is no tokenizer.json to read instead; use a checkpoint that has one."
        )
    elif not is_there and not (folder / "config.json").exists():
        raise TokenizerError(
            f"{folder} has no config.json and no tokenizer, so it is no checkpoint; give the folder of one."
        )
    elif not is_there:
        raise TokenizerError(f"no tokenizer in {folder} ({' or '.join(TOKENIZER_FILES)}); download it as well.")


def _check_named_modules(folder: Path, settings: Mapping[str, Any]) -> None:
    for key, package in NAMED_MODULES.items():
        value, known = settings.get(key), [m.name for m in pkgutil.iter_modules(package.__path__)]
        if value is not None and value not in known:
            raise TokenizerError(
                f"{key} {value!r} in {folder / 'tokenizer_config.json'} is none that mlx-lm has ({', '.join(known)}); "
                "remove it there."
            )


def _rows(folder: Path) -> int | None:
    """Rows of the model's embedding; None if config.json does not say, which its own check reports."""
    rows = read_json(folder / "config.json").get("vocab_size") if (folder / "config.json").is_file() else None
    return rows if type(rows) is int and 0 < rows < 1 << 31 else None


def _named_eos(folder: Path) -> set[int]:
    ids: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        if (folder / name).exists():
            value = read_json(folder / name).get("eos_token_id")
            listed = value if isinstance(value, list) else [] if value is None else [value]
            if not all(type(i) is int and 0 <= i <= MOST_INTEGER for i in listed):
                raise TokenizerError(f"eos_token_id {shown(value)} in {folder / name} is no token's id; correct it.")
            ids.update(listed)
    return ids

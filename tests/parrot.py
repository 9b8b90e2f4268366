"""A tiny checkpoint that says given pieces, one token each, whatever it is asked, and then ends its turn.

Every layer adds nothing, since its output matrices are zero, so the next token depends on the last one alone: row t of
the embedding is the place of token t in the script, and the head gives the next one there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from safetensors.numpy import save_file

from ring_mlx import demo_model_path
from tests.tiny import config

WIDTH = 128
ROLE_END = 2


def byte_letters() -> list[str]:
    """The letter of a byte-level vocabulary for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(others)) for b in range(256)]


def make_parrot(
    folder: Path,
    pieces: Sequence[str | bytes | int],
    gap: int = 0,
    rows: int = 0,
    spare: Iterable[str] = (),
    **shape: Any,
) -> Path:
    """Write the checkpoint.

    Args:
        folder: Where.
        pieces: Texts, bytes or ids, each once; those that are no token of the demo become one.
        gap: Ids between the demo's tokens and the new ones that no token has.
        rows: Rows of the embedding beyond the last token.
        spare: Further tokens, which it can be taught to say.
        shape: Other values of config.json than the smallest.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer: dict[str, Any] = json.loads((demo_model_path() / "tokenizer.json").read_text())
    letters, vocabulary = byte_letters(), tokenizer["model"]["vocab"]
    script, new = [], 1024 + gap
    spare = list(spare)
    for n, piece in enumerate([*pieces, *spare]):
        if isinstance(piece, int):
            script.append(piece)
            continue
        name = "".join(letters[b] for b in (piece.encode() if isinstance(piece, str) else piece))
        if name not in vocabulary:
            vocabulary[name], new = new, new + 1
        if n < len(pieces):
            script.append(vocabulary[name])
    assert len(set(script)) == len(script), "each piece must be another token"
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(demo_model_path() / name, folder)
    size = max(new + rows, *(i + 1 for i in script))
    least = {"num_hidden_layers": 2, "layer_group_size": 2, "first_k_dense_replace": 2, "num_experts": 0}
    least["max_position_embeddings"] = 4096
    raw = config(**least | shape, hidden_size=WIDTH, vocab_size=size, eos_token_id=ROLE_END)
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(_layers(raw) | _weights(size, script), folder / NAME)
    return folder


def teach(model: Any, tokenizer: Any, pieces: Sequence[str]) -> None:
    """Let a parrot that has been loaded say other pieces, all of them tokens, in place of its own."""
    vocabulary, letters = tokenizer.get_vocab(), byte_letters()
    script = [vocabulary["".join(letters[b] for b in piece.encode())] for piece in pieces]
    weights = _weights(model.config.vocab_size, script)
    model.load_weights([(name, mx.array(w)) for name, w in weights.items()], strict=False)


def _weights(size: int, script: Sequence[int]) -> dict[str, np.ndarray[Any, Any]]:
    """Embedding and head of a script."""
    embedding, head = np.zeros((size, WIDTH), np.float32), np.zeros((size, WIDTH), np.float32)
    places = _places(len(script) + 1)
    embedding[:] = places[0]  # what is not in the script begins it
    embedding[list(script)] = places[1:]
    head[[*script, ROLE_END]] = 8 * places
    return {"model.word_embeddings.weight": embedding, "lm_head.weight": head}


def _places(count: int) -> np.ndarray[Any, Any]:
    """So many directions, far enough apart that each is told from the others."""
    if count <= WIDTH:
        return np.eye(WIDTH, dtype=np.float32)[:count]
    signs = np.random.default_rng(0).choice(np.float32([-1, 1]), (count, WIDTH))
    return signs / np.float32(np.sqrt(WIDTH))


def cut(text: str, size: int) -> list[str]:
    """A text in pieces of so many letters, or more where a piece came before, as `make_parrot` takes them."""
    pieces: list[str] = []
    at = 0
    while at < len(text):
        end = at + size
        while text[at:end] in pieces and end < len(text):
            end += 1
        assert text[at:end] not in pieces, "the text ends in a piece that came before"
        pieces.append(text[at:end])
        at = end
    return pieces


NAME = "model.safetensors"


def _layers(raw: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    from mlx.utils import tree_flatten

    from ring_mlx.model.config import RingConfig
    from ring_mlx.model.model import Model

    made = {}
    for name, value in tree_flatten(Model(RingConfig.from_dict(raw)).parameters()):
        is_norm = "norm" in name
        made[name] = np.full(value.shape, 1.0 if is_norm else 0.0, np.float32)
        if "query_key_value" in name:
            made[name] = np.random.default_rng(0).standard_normal(value.shape).astype(np.float32) / 50
    return made

"""The table of docs/session.md on what a memory budget holds, computed by the tree's own account of true sizes."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from ring_mlx.engine.snapshots import BLOCK_TOKENS, Block, Snapshot, SnapshotTree
from ring_mlx.model import memory
from ring_mlx.model.config import RingConfig
from tests.tiny import config

TURN_TOKENS, CHAT_TOKENS, VOCABULARY = 500, 4000, 157184
PAGE = Path(__file__).parent.parent / "docs" / "session.md"
SHAPES = {
    "mini": {"num_hidden_layers": 20, "layer_group_size": 5, "num_attention_heads": 16},
    "flash": {"num_hidden_layers": 32, "layer_group_size": 8, "num_attention_heads": 32},
}


class Chat:
    """Snapshots of the true sizes; their arrays are never computed, so they take no memory."""

    def __init__(self, model, number):
        self.raw = RingConfig.from_dict(config(num_key_value_heads=4, head_dim=128, group_norm_size=4, **SHAPES[model]))
        self.number, self.blocks = number, []

    def block(self, tokens):
        softmax = sum(not self.raw.is_linear(i) for i in range(self.raw.num_hidden_layers))
        return Block(tokens, [mx.zeros((1, 4, len(tokens), 128), mx.bfloat16) for _ in range(2 * softmax)])

    def snapshot(self, offset, kind):
        tokens = np.full(offset, self.number, dtype=np.int32)
        while (start := BLOCK_TOKENS * len(self.blocks)) + BLOCK_TOKENS <= offset:
            self.blocks.append(self.block(tokens[start : start + BLOCK_TOKENS]))
        linear = sum(self.raw.is_linear(i) for i in range(self.raw.num_hidden_layers))
        states = [mx.zeros((1, self.raw.num_attention_heads, 128, 128)) for _ in range(linear)]
        tail = self.block(tokens[start:]) if start < offset else None
        logits = mx.zeros((1, VOCABULARY)) if kind == "user" else None
        return Snapshot(tokens, states, list(self.blocks), tail, (None,), logits, kind)


def turns(model, budget):
    """Of one chat, with every question and answer kept as a place to go back to."""
    tree, chat, n = SnapshotTree(budget), Chat(model, 1), 0
    while len(tree) == 2 * n:
        for part, kind in ((n * TURN_TOKENS + 100, "answer"), ((n + 1) * TURN_TOKENS, "user")):
            tree.settle(tree.add(chat.snapshot(part, kind), chat).tokens, chat)
        n += 1
    return n - 1


def chats(model, budget):
    """Of which each goes on from where it ended."""
    tree, n = SnapshotTree(budget), 0
    while len(tree) == n:
        chat = Chat(model, n)
        tree.settle(tree.add(chat.snapshot(CHAT_TOKENS, "user"), chat).tokens, chat)
        n += 1
    return n - 1


@pytest.mark.parametrize("model", SHAPES)
def test_the_sizes_are_the_models_own(model):
    s = Chat(model, 0).snapshot(CHAT_TOKENS, "answer")
    assert s.nbytes == memory.cache_bytes(Chat(model, 0).raw, CHAT_TOKENS)
    assert sum(a.nbytes for a in s.states) == {"mini": 16, "flash": 56}[model] << 20
    assert sum(p.nbytes for p in s.parts) == 8192 * CHAT_TOKENS


@pytest.mark.parametrize("gib", [1, 4, 8])
def test_the_page_says_what_a_budget_holds(gib):
    figures = [f(model, gib << 30) for model in SHAPES for f in (turns, chats)]
    assert f"| {gib} GiB | {' | '.join(map(str, figures))} |" in PAGE.read_text(encoding="utf-8")

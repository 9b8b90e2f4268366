"""Trains Ring-nano: ``python -m demo.train --out DIR --minutes 23``, again with the same DIR to go on.

Every ``--save-every`` seconds weights, optimiser and counters go to DIR/checkpoint, whole or not at all; DIR/log.csv
grows by a line every ten steps of each width. The learning rate follows the share of ``--minutes`` that has been trained, so a
resumed run ends where an uninterrupted one would. Needs the packages of the project and a tokenizer folder.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import multiprocessing
import os
import random
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Rows = tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint8]]

HERE = Path(__file__).parent
SHORT, LONG = 512, 4352
# Of the conversations in long and in short rows, those that end with several questions about what they stated.
MANY_RECALL_SHARE = {LONG: 0.8, SHORT: 0.12}
TOKENS_A_QUESTION = {LONG: 100, SHORT: 60}  # of such a conversation, for as many questions as it may have
TOPIC_SHARE = 0.5  # of such conversations, those told under headings
# Softmax attention before the last such layer looks back so far, in most steps: what lies further must be in the states.
WINDOW = 128
PEAK_RATE, LAST_RATE, WARMUP_STEPS = 3e-3, 1e-5, 100
BIAS_STEP = 1e-3
# Of freed buffers, which MLX keeps; a run once died of memory on a GPU of 80 GB, its cause unproven.
CACHE_BYTES = 16 << 30
SEPARATOR = "<|endoftext|>"


def encode(tokenizer: Any, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Ids of a text and a separator, and 1 where the loss counts: within the spans."""
    encoding = tokenizer.encode(text + SEPARATOR, add_special_tokens=False)
    counted, at = [0] * len(encoding.ids), 0
    for i, (start, end) in enumerate(encoding.offsets):
        while at < len(spans) and spans[at][1] <= start:
            at += 1
        counted[i] = int(at < len(spans) and spans[at][0] <= start and end <= spans[at][1])
    return encoding.ids, counted


def texts(seed: int, width: int, tokenizer: Any) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """An endless mix of rendered conversations: all tasks, and several questions about what was stated, up to the width."""
    from demo.data import render, stream
    from demo.render import render_thinking_from
    from demo.tasks_recall import make_many_recall, make_recall
    from demo.tasks_topic import make_topic_recall

    rng, mix = random.Random(seed), stream(seed)

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    while True:
        if rng.random() < MANY_RECALL_SHARE[width]:
            shortest = 300 if width == LONG else 100
            target = int(math.exp(rng.uniform(math.log(shortest), math.log(width - 150))))
            if width == LONG and rng.random() < 0.15:
                yield render(make_recall(rng, "train", target, count))
            else:
                questions = rng.randint(2, 2 + target // TOKENS_A_QUESTION[width])
                make = make_topic_recall if rng.random() < TOPIC_SHARE else make_many_recall
                yield render_thinking_from(*make(rng, "train", target, count, questions))
        else:
            yield render(next(mix))


def rows(seed: int, width: int, tokenizer_folder: str) -> Iterator[Rows]:
    """Rows of ``width`` + 1 ids made of whole conversations, each closed by a separator.

    One that does not fit starts the next row.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(tokenizer_folder) / "tokenizer.json"))
    source, filler = texts(seed, width, tokenizer), texts(seed + 1, SHORT, tokenizer)
    ids: list[int] = []
    counted: list[int] = []
    while True:
        waiting = encode(tokenizer, *next(source))
        while len(ids) + len(waiting[0]) <= width + 1:
            ids, counted = ids + waiting[0], counted + waiting[1]
            waiting = encode(tokenizer, *next(source))
        for _ in range(3 if width == SHORT else 40):
            short = encode(tokenizer, *next(filler))
            if len(ids) + len(short[0]) <= width + 1:
                ids, counted = ids + short[0], counted + short[1]
        row = np.zeros((2, width + 1), np.uint16)
        n = min(len(ids), width + 1)
        row[0, :n], row[1, :n] = ids[:n], counted[:n]
        yield row[0], row[1].astype(np.uint8)
        ids, counted = waiting


def produce(queue: Any, seed: int, width: int, count: int, tokenizer_folder: str) -> None:
    """A worker: fills the queue with batches of ``count`` rows."""
    source = rows(seed, width, tokenizer_folder)
    while True:
        batch = [next(source) for _ in range(count)]
        queue.put((np.stack([b[0] for b in batch]), np.stack([b[1] for b in batch])))


def start_workers(seed: int, args: argparse.Namespace) -> dict[int, Any]:
    """Queues of short and long batches, with the processes shared between them."""
    context = multiprocessing.get_context("spawn")
    queues = {SHORT: context.Queue(maxsize=4 * args.workers), LONG: context.Queue(maxsize=4 * args.workers)}
    for i in range(max(2, args.workers)):
        width = LONG if i % 2 else SHORT
        work = (queues[width], seed * 1000 + i, width, max(1, args.tokens // width), args.tokenizer)
        context.Process(target=produce, args=work, daemon=True).start()
    return queues


class Trainer:
    """Model, optimiser and one step.

    Args:
        folder: Where checkpoints and the log are; an existing checkpoint is taken up.
        start_from: A model folder whose weights to begin with, if there is no checkpoint.
        window_share: Of the steps, those in which all softmax layers but the last look back `WINDOW` tokens only.
        is_compiled: Compile the gradients too, not only the optimiser.
    """

    def __init__(
        self, folder: Path, start_from: str | None = None, window_share: float = 0.0, is_compiled: bool = False
    ) -> None:
        import mlx.core as mx
        import mlx.optimizers as optim

        from ring_mlx.model.config import RingConfig
        from ring_mlx.model.model import Model

        mx.random.seed(0)
        self.folder, self.step, self.trained_s, self.window_share = folder, 0, 0.0, window_share
        self.model = Model(RingConfig.from_dict(json.loads((HERE / "config.json").read_text())))
        initialise(self.model)
        if start_from is not None:
            self.model.load_weights(dense_weights(Path(start_from)))
        for layer in self.moe_layers():
            layer.mlp.gate.freeze(keys=["expert_bias"], recurse=False)
        self.optimizer = optim.AdamW(PEAK_RATE, betas=[0.9, 0.95], weight_decay=0.02)
        self.optimizer.init(self.model.trainable_parameters())
        if (folder / "checkpoint").is_dir():
            self.resume()
        self.state = [self.model.state, self.optimizer.state]
        mx.eval(self.state)
        # One small kernel serves the optimiser for every parameter; the gradients make a hundred kernels, which took
        # 130 s at the start on an H100.
        if is_compiled:
            self.update = mx.compile(self.update, inputs=self.state, outputs=self.state)  # type: ignore[method-assign]
        else:
            self.apply = mx.compile(self.apply, inputs=self.state, outputs=self.state)  # type: ignore[method-assign]

    def moe_layers(self) -> list[Any]:
        """The layers with experts."""
        return [layer for i, layer in enumerate(self.model.layers) if self.model.config.is_moe(i)]

    def is_windowed(self) -> bool:
        """Whether softmax attention looks back `WINDOW` tokens only in this step; the same for the same step."""
        return random.Random(self.step).random() < self.window_share

    def update(self, ids: Any, counted: Any, is_windowed: int) -> tuple[Any, Any, Any]:
        """One step; returns loss, gradient norm and the busiest expert's load over the mean, all still lazy."""
        import mlx.core as mx
        import mlx.nn as nn

        from demo.window import windowed

        def loss_and_loads(model: Any) -> tuple[Any, list[Any]]:
            loads: list[Any] = []
            with_dense_experts(loads)
            with windowed(model, WINDOW if is_windowed else None):
                logits = model(ids[:, :-1])
            losses = nn.losses.cross_entropy(logits, ids[:, 1:]) * counted[:, 1:]
            return losses.sum() / counted[:, 1:].sum(), loads

        (loss, loads), grads = nn.value_and_grad(self.model, loss_and_loads)(self.model)
        norm = self.apply(grads)
        spread = mx.array(0.0)
        for layer, load in zip(self.moe_layers(), loads, strict=True):
            gate = layer.mlp.gate
            gate.expert_bias = gate.expert_bias + BIAS_STEP * mx.sign(load.mean() - load)
            spread = mx.maximum(spread, load.max() / load.mean())
        return loss, norm, spread

    def apply(self, grads: Any) -> Any:
        """Take the gradients to the weights; returns their norm."""
        import mlx.optimizers as optim

        grads, norm = optim.clip_grad_norm(grads, 1.0)
        self.optimizer.update(self.model, grads)
        return norm

    def save(self) -> None:
        """Write a checkpoint beside the last one, then put it in its place."""
        import mlx.core as mx
        from mlx.utils import tree_flatten

        new, old = self.folder / "checkpoint.new", self.folder / "checkpoint"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        mx.save_safetensors(str(new / "model.safetensors"), dict(tree_flatten(self.model.parameters())))
        mx.save_safetensors(str(new / "optimizer.safetensors"), dict(tree_flatten(self.optimizer.state)))
        (new / "progress.json").write_text(json.dumps({"step": self.step, "trained_s": self.trained_s}))
        shutil.rmtree(old, ignore_errors=True)
        os.replace(new, old)

    def resume(self) -> None:
        """Take up the checkpoint."""
        import mlx.core as mx
        from mlx.utils import tree_unflatten

        folder = self.folder / "checkpoint"
        self.model.load_weights(str(folder / "model.safetensors"))
        self.optimizer.state = tree_unflatten(list(mx.load(str(folder / "optimizer.safetensors")).items()))
        progress = json.loads((folder / "progress.json").read_text())
        self.step, self.trained_s = progress["step"], progress["trained_s"]


def dense_weights(folder: Path) -> list[tuple[str, Any]]:
    """The weights of a model folder in float32, whether they are quantized or not."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.utils import dequantize_model

    from ring_mlx import load_model

    model = dequantize_model(load_model(folder))
    return [(name, w.astype(mx.float32)) for name, w in tree_flatten(model.parameters())]


def with_dense_experts(loads: list[Any]) -> None:
    """Make every `MoE` compute densely and report its loads."""
    from demo.dense_moe import dense_moe
    from ring_mlx.model.moe import MoE

    def call(self: MoE, x: Any, dtype: Any = None, residual: Any = None, logits: Any = None) -> Any:
        return dense_moe(self, x, residual, logits, loads)

    MoE.__call__ = call  # type: ignore[method-assign]


def initialise(model: Any) -> None:
    """Normal weights of deviation 0.02, smaller where a layer adds to the residual stream; norms stay at one."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    depth = (2 * len(model.layers)) ** -0.5
    new = []
    for name, p in tree_flatten(model.parameters()):
        if p.ndim > 1:
            scale = 0.5 * p.shape[-1] ** -0.5
            if "down_proj" in name or ".dense." in name:
                scale *= depth
            new.append((name, mx.random.normal(p.shape) * (0.02 if "word_embeddings" in name else scale)))
    model.load_weights(new, strict=False)


def rate(progress: float, step: int, peak: float) -> float:
    """Learning rate: a linear warm-up, then a cosine over the share of the time that has passed."""
    cosine = LAST_RATE + (peak - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return cosine * min(1.0, (step + 1) / WARMUP_STEPS)


class Log:
    """log.csv and the lines on the screen.

    Args:
        path: The CSV, appended to.
        print_every: Steps between lines.
    """

    COLUMNS = ("step", "trained_s", "width", "tokens", "loss", "grad_norm", "max_load_over_mean", "rate")

    def __init__(self, path: Path, print_every: int) -> None:
        is_new = not path.exists()
        self._file, self._print_every = path.open("a", newline=""), print_every
        self._writer = csv.writer(self._file)
        self._smooth: dict[int, float] = {}
        self._seen: dict[int, int] = {}
        if is_new:
            self._writer.writerow(self.COLUMNS)

    def add(self, step: int, trained_s: float, shape: tuple[int, int], rate: float, values: Sequence[Any]) -> None:
        """Take the figures of a step; stops the program where they are not finite, so that no checkpoint holds them."""
        import mlx.core as mx

        loss, norm, spread = (v.item() for v in values)
        if not math.isfinite(loss + norm):
            self.close()
            sys.exit(f"step {step}: loss {loss}, gradient norm {norm}; the last checkpoint is kept")
        width = shape[1] - 1
        self._smooth[width] = 0.95 * self._smooth.get(width, loss) + 0.05 * loss
        self._seen[width] = self._seen.get(width, 0) + 1
        if self._seen[width] % 10 == 1:
            figures = (f"{loss:.4f}", f"{norm:.3f}", f"{spread:.2f}", f"{rate:.2e}")
            self._writer.writerow([step, f"{trained_s:.1f}", width, shape[0] * width, *figures])
        if step % self._print_every == 0:
            self._file.flush()
            losses = " ".join(f"{w}: {v:.4f}" for w, v in sorted(self._smooth.items()))
            print(
                f"step {step} {trained_s:.0f} s loss {losses} norm {norm:.2f} load {spread:.2f} rate {rate:.1e} "
                f"peak {mx.get_peak_memory() / 1e9:.1f} GB",
                flush=True,
            )

    def close(self) -> None:
        """Write what is still held back."""
        self._file.close()


def train(args: argparse.Namespace) -> None:
    """Train until the minutes of the whole run, or of this call, are over."""
    import mlx.core as mx

    from metal_kernels.launch import SWITCH

    os.environ[SWITCH] = "off"  # kernels have no gradients
    mx.set_cache_limit(CACHE_BYTES)
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(folder, args.start_from, args.window_share, args.compile_gradients)
    log = Log(folder / "log.csv", args.print_every)
    queues = start_workers(args.seed + trainer.step, args)
    total_s, call_s = args.minutes * 60, args.minutes_this_call * 60
    started = last = saved = time.monotonic()
    waiting: tuple[Any, ...] | None = None  # a step's figures are read while the next one runs
    while trainer.trained_s < total_s and last - started < call_s:
        width = LONG if trainer.step % args.long_every == args.long_every - 1 else SHORT
        ids, counted = queues[width].get(timeout=300)
        lr = rate(trainer.trained_s / total_s, trainer.step, args.peak_rate)
        trainer.optimizer.learning_rate = lr
        batch = mx.array(ids.astype(np.int32)), mx.array(counted.astype(np.float32))
        values = trainer.update(*batch, int(trainer.is_windowed()))
        mx.async_eval(trainer.state, values)
        if waiting is not None:
            log.add(*waiting)
        now = time.monotonic()
        trainer.trained_s, last = trainer.trained_s + now - last, now
        trainer.step += 1
        waiting = trainer.step, trainer.trained_s, ids.shape, lr, values
        if now - saved > args.save_every:
            trainer.save()
            saved = now
    if waiting is not None:
        log.add(*waiting)
    trainer.save()
    log.close()
    print(f"stopped at step {trainer.step} after {trainer.trained_s:.0f} s", flush=True)


def main() -> int:
    """The command line."""
    os.environ.setdefault("MLX_ENABLE_TF32", "1")  # faster, and what the packaged weights were trained with
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="folder of checkpoint and log")
    parser.add_argument("--tokenizer", default=str(HERE.parent / "ring_mlx" / "demo_model"), help="tokenizer folder")
    parser.add_argument("--minutes", type=float, default=23, help="length of the whole training")
    parser.add_argument("--minutes-this-call", type=float, default=1e9, help="stop this call earlier, to go on later")
    parser.add_argument("--start-from", help="model folder whose weights to begin with")
    parser.add_argument("--compile-gradients", action="store_true", help="a slow start for faster steps")
    parser.add_argument("--peak-rate", type=float, default=PEAK_RATE, help="learning rate after the warm-up")
    parser.add_argument("--tokens", type=int, default=SHORT * 64, help="tokens a step")
    parser.add_argument("--long-every", type=int, default=3, help="one step in so many is of long conversations")
    parser.add_argument("--window-share", type=float, default=0.75, help="of the steps, those of a windowed softmax")
    parser.add_argument("--save-every", type=float, default=60, help="seconds between checkpoints")
    parser.add_argument("--print-every", type=int, default=100, help="steps between lines")
    parser.add_argument("--workers", type=int, default=max(2, (os.cpu_count() or 2) - 2), help="data processes")
    parser.add_argument("--seed", type=int, default=1, help="seed of the data")
    train(parser.parse_args())
    return 0


if __name__ == "__main__":
    sys.exit(main())

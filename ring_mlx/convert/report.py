"""How far a conversion's predictions are from its source's, one layer of one model in memory at a time.

Both residual streams advance through a layer before the next is read, so that neither model is held.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ring_mlx.checkpoint.tokenizer import load_tokenizer
from ring_mlx.convert import writer
from ring_mlx.convert.remarks import grid_note
from ring_mlx.convert.sources import open_source
from ring_mlx.convert.streams import FloatStream, LoadedStream, Stream
from ring_mlx.errors import OptionError
from ring_mlx.evaluation.divergence import HEAD_TOKENS, Divergence, divergence, summary
from ring_mlx.evaluation.perplexity import Floats
from ring_mlx.evaluation.sharing import shared
from ring_mlx.generation.templates import render_chat
from ring_mlx.system.files import MOST_TEXT_BYTES, text_of
from ring_mlx.system.progress import Progress

TEXT = Path(__file__).parent / "report_text.jsonl"
BATCH_TOKENS = 2048
REPORT = "report.json"
HEADING = "## Divergence from the source\n"


@dataclass(frozen=True)
class Report:
    """Divergence for each kind of text and over all, sizes in bytes, and how well an integer grid was kept."""

    source_bytes: int
    result_bytes: int
    kinds: dict[str, Divergence]
    grid: str = ""


@dataclass(frozen=True)
class Batch:
    """Rows of similar length, padded on the right, and from where to where in each row tokens are predicted."""

    tokens: mx.array
    spans: list[tuple[int, int]]
    kinds: list[str]


def read_text(path: Path | None = None, packaged: Path = TEXT, flag: str = "--report") -> list[dict[str, Any]]:
    """Rows of the packaged text, of a JSON-lines file with ``messages`` or ``text`` and perhaps ``kind``, or of a plain
    one in paragraphs; raises OptionError if it cannot be read.
    """
    chosen = path or packaged
    try:
        content = text_of(chosen, MOST_TEXT_BYTES)
        if chosen.suffix == ".jsonl":
            return [_checked(json.loads(line)) for line in content.split("\n") if line]
    except (OSError, ValueError, TypeError, RecursionError) as e:
        raise OptionError(f"{flag} {chosen} cannot be read ({e}); give a text or JSON-lines file.") from None
    return [{"kind": "text", "text": part} for part in content.split("\n\n") if part.strip()]


def _checked(row: Any) -> dict[str, Any]:
    if isinstance(row, dict):
        messages = row.get("messages")
        is_chat = isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages)
        if is_chat or ("messages" not in row and isinstance(row.get("text"), str)):
            return row
    raise ValueError(f"{json.dumps(row)[:60]} has neither messages nor text")


def compare(
    source: str | os.PathLike[str],
    result: str | os.PathLike[str],
    rows: Sequence[Mapping[str, Any]],
    *,
    revision: str | None = None,
    dtype: mx.Dtype | None = None,
    progress: Progress | None = None,
) -> Report:
    """Run both models over the same text.

    Args:
        source: What was converted: a folder, or owner/name, whose shards are fetched one by one.
        result: The converted folder; its tokenizer is used.
        rows: From `read_text`.
        dtype: In which layers compute, by default float32 on MLX's CPU backend and bfloat16 elsewhere; the residual
            streams and the divergence are always float32.
        progress: Called with (layers done, all and one for the head, what it is at).
    """
    dtype = dtype or (mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16)
    opened, made = open_source(source, revision, remote_only=True), open_source(result)
    # What was chosen for the result is no divergence.
    opened = replace(opened, config=replace(opened.config, decay_layer_offset=made.config.decay_layer_offset))
    batches = make_batches(made.folder, rows)
    count = opened.config.num_hidden_layers
    with tempfile.TemporaryDirectory() as scratch:
        streams: list[Stream] = [FloatStream(opened, dtype, scratch=Path(scratch)), LoadedStream(made, dtype)]
        try:
            measured = _run(streams, batches, count, progress)
        finally:
            for stream in streams:
                stream.close()
    manifest = writer.read_manifest(made.folder) if (made.folder / writer.MANIFEST).is_file() else {}
    return Report(opened.nbytes, made.nbytes, _summaries(measured), grid_note(manifest))


def table(report: Report) -> str:
    ratio = report.result_bytes / report.source_bytes
    lines = [
        f"size {report.result_bytes / 1e9:.3f} GB, {ratio:.3f} of the source's {report.source_bytes / 1e9:.3f} GB",
        f"{'text':14} {'tokens':>7} {'KL mean':>9} {'median':>9} {'99 %':>9} {'flips':>7} {'ppl':>9} {'ratio':>7}",
    ]
    for kind, d in report.kinds.items():
        lines.append(
            f"{kind:14} {d.tokens:7} {d.kl_mean:9.5f} {d.kl_median:9.5f} {d.kl_99:9.5f} {d.flips:7.2%} "
            f"{d.reference_perplexity:9.3f} {d.perplexity_ratio:7.4f}"
        )
    if report.grid:
        lines.append(report.grid)
    return "\n".join(lines)


def save(report: Report, folder: Path) -> None:
    """Put report.json and a section of README.md into a converted folder, and into its manifest, or change nothing."""
    readme = (folder / "README.md").read_text(encoding="utf-8").partition(HEADING)[0]
    text = "".join(f"    {line}\n" for line in table(report).splitlines())
    found = {**vars(report), "kinds": {kind: _saved(d) for kind, d in report.kinds.items()}}
    texts = {"README.md": f"{readme}{HEADING}\n{text}", REPORT: json.dumps(found, indent=2) + "\n"}
    with writer.disk_errors(folder):
        writer.amend(folder, texts)


def _saved(d: Divergence) -> dict[str, float]:
    """For report.json, whose ``perplexity`` is the source's."""
    names = ("kl_mean", "kl_median", "kl_99", "flips")
    found = {"positions": d.tokens, **{name: getattr(d, name) for name in names}}
    return found | {"perplexity": d.reference_perplexity, "perplexity_ratio": d.perplexity_ratio}


def make_batches(folder: Path, rows: Sequence[Mapping[str, Any]], flag: str = "--report") -> list[Batch]:
    """Tokens of every row, by the tokenizer and template of ``folder``, in batches of similar length.

    What is beyond BATCH_TOKENS in a row is left out, and a conversation whose last answer begins there. Raises
    OptionError if no row has two tokens.
    """
    tokenizer = load_tokenizer(folder)
    cut = [(ids[:BATCH_TOKENS], start, kind) for ids, start, kind in (_tokenise(tokenizer, row) for row in rows)]
    ready = sorted((r for r in cut if r[1] < len(r[0])), key=lambda r: len(r[0]))
    if not ready:
        raise OptionError(
            f"the text of {flag} has no two tokens together, or no answer within {BATCH_TOKENS} tokens; give another."
        )
    groups: list[list[tuple[list[int], int, str]]] = [[]]
    for row in ready:
        if groups[-1] and len(row[0]) * (len(groups[-1]) + 1) > BATCH_TOKENS:
            groups.append([])
        groups[-1].append(row)
    batches = []
    for group in groups:
        width = len(group[-1][0])
        padded = mx.array([ids + [0] * (width - len(ids)) for ids, _, _ in group], dtype=mx.int32)
        batches.append(Batch(padded, [(start, len(ids)) for ids, start, _ in group], [kind for _, _, kind in group]))
    return batches


def _tokenise(tokenizer: TokenizerWrapper, row: Mapping[str, Any]) -> tuple[list[int], int, str]:
    """Token ids, the first that is predicted (of a conversation: of its last answer), and the kind."""
    if "messages" not in row:
        return list(tokenizer.encode(str(row["text"]))), 1, str(row.get("kind", "text"))
    whole = render_chat(tokenizer, row["messages"], continue_last=True)
    prompt = render_chat(tokenizer, row["messages"][:-1])
    return whole, max(1, shared(whole, prompt)), str(row.get("kind", "conversations"))


def _run(
    streams: Sequence[Stream], batches: Sequence[Batch], count: int, progress: Progress | None
) -> dict[str, list[Floats]]:
    """Take both streams through all layers together; by kind, `divergence` wherever a token follows."""
    states = [s.embed([b.tokens for b in batches]) for s in streams]
    for layer in range(count):
        for stream, own in zip(streams, states, strict=True):
            stream.advance(layer, own)
        if progress:
            progress(layer + 1, count + 1, f"layer {layer}")
    found: dict[str, list[Floats]] = {}
    for done, (batch, *both) in enumerate(zip(batches, *states, strict=True), 1):
        for row, ((first, end), kind) in enumerate(zip(batch.spans, batch.kinds, strict=True)):
            for start in range(first, end, HEAD_TOKENS):
                stop = min(start + HEAD_TOKENS, end)
                left, right = (s.logits(x[row, start - 1 : stop - 1]) for s, x in zip(streams, both, strict=True))
                found.setdefault(kind, []).append(divergence(left, right, batch.tokens[row, start:stop]))
        if progress:
            progress(count + done / len(batches), count + 1, "the head")
    return found


def _summaries(kinds: Mapping[str, list[Floats]]) -> dict[str, Divergence]:
    out = {kind: summary(arrays) for kind, arrays in sorted(kinds.items())}
    if len(kinds) > 1:
        out["all"] = summary([a for arrays in kinds.values() for a in arrays])
    return out

"""An answer's record: its figures, in a few words or line by line."""

from __future__ import annotations

from ring_mlx import end_note, harmless
from tui.config import with_setting
from tui.gauges import counted, seconds
from tui.messages import Figures, Loaded, Sampling, sampling_as_dict
from tui.store import Record, Turn
from tui.store.records import ASSISTANT

MOST_SHOWN = 300  # characters of a system prompt
FULL = "context"  # an answer that ended with the context
GO_ON = {
    "length": "/continue goes on, or raise max_tokens",
    FULL: "the context is full: begin a new chat (/new), or go back to an earlier turn (/branch)",
}
UNFINISHED = "the answer is not finished"  # its process was killed, or another window writes it


MEASURED = ("prompt_tokens", "reused_tokens", "time_to_first_token_s", "prompt_tps", "generation_tps")
ADDED = (
    "generated_tokens",
    "thinking_tokens",
    "thinking_s",
    "drafted_tokens",
    "accepted_tokens",
)  # to those of the part that was continued


def record_of(model: Loaded, sampling: Sampling, f: Figures, reason: str, before: Record | None = None) -> Record:
    """The record of an answer that has ended; ``before`` is that of the part that was continued."""
    before = before or Record()
    if reason == "length" and f.prompt_tokens + f.generated_tokens > model.context:
        reason = FULL
    seed = {} if f.seed is None else {"seed": f.seed}
    return Record(
        model=model.name,
        quantisation=model.quantization,
        sampling=sampling_as_dict(model.sampling) | sampling_as_dict(sampling) | seed,
        **{name: getattr(f, name) for name in MEASURED},
        **{name: getattr(before, name) + getattr(f, name) for name in ADDED},
        peak_memory_gb=f.peak_memory_bytes / 1e9,
        finish_reason=reason,
    )


def sampling_of(record: Record | None) -> Sampling | None:
    """The sampling that repeats an answer, or None if its record has no seed or wrong values."""
    sampling = Sampling()
    try:
        for name, value in (record.sampling if record else {}).items():
            sampling = with_setting(sampling, name, value)
    except ValueError:
        return None
    return sampling if sampling.seed is not None else None


def thought_size(record: Record) -> str:
    """Such as "1.2 s, 340 tokens", or nothing without a thought."""
    return f"{record.thinking_s:.1f} s, {counted(record.thinking_tokens, 'token')}" if record.thinking_tokens else ""


def record_text(record: Record) -> str:
    """An answer's record in a few words; an edited answer has none."""
    if not record.generated_tokens:
        return ""
    reused = f", {record.reused_tokens:,} reused" if record.reused_tokens else ""
    return (
        f"{counted(record.generated_tokens, 'token')} at {record.generation_tps:,.0f} tok/s, first after "
        f"{seconds(record.time_to_first_token_s)}{reused}"
    )


def end_words(turn: Turn) -> str:
    """A note about how an answer ended; nothing if it is complete, was stopped or failed, and for a question."""
    r = turn.record
    if r is None and turn.role == ASSISTANT and turn.thinking and not turn.is_damaged:
        return f"{UNFINISHED}; {'/continue goes on' if turn.content.strip() else '/regenerate asks again'}."
    if r is None or r.finish_reason not in ("stop", *GO_ON):
        return ""
    reason, remedy = ("length", GO_ON[r.finish_reason]) if r.finish_reason in GO_ON else ("stop", "")
    text = "".join([turn.content, *(call.name for call in turn.calls)])
    return end_note(reason, r.generated_tokens, r.thinking_tokens, text, remedy)


def record_lines(r: Record) -> list[str]:
    """Name and value, a line each."""
    rows = [
        ("model", f"{r.model}{', ' + r.quantisation if r.quantisation else ''}"),
        ("sampling", ", ".join(f"{name} {value}" for name, value in r.sampling.items())),
        (
            "prompt",
            f"{counted(r.prompt_tokens, 'token')}, {r.reused_tokens:,} of them reused, read at {r.prompt_tps:,.0f} tok/s",
        ),
        ("first token", f"after {r.time_to_first_token_s:.2f} s"),
        ("generated", f"{counted(r.generated_tokens, 'token')} at {r.generation_tps:,.1f} tok/s"),
        ("thought", f"{counted(r.thinking_tokens, 'token')} in {r.thinking_s:.1f} s"),
        ("memory", f"{r.peak_memory_gb:.2f} GB at its peak"),
        ("end", r.finish_reason or "unknown"),
        ("edited", "yes, by hand" if r.is_edited else "no"),
    ]
    if r.drafted_tokens:
        rows.insert(5, ("drafts", f"{r.accepted_tokens:,} of {counted(r.drafted_tokens, 'token')} accepted"))
    if r.system_prompt:
        rows.insert(2, ("system", shortened(r.system_prompt)))
    return [f"{name:<12} {harmless(value, is_name=True)}" for name, value in rows]


def shortened(text: str) -> str:
    """The beginning of a text in one line, with its length if that is not all."""
    said = " ".join(text[:MOST_SHOWN].split())
    return said if len(text) <= MOST_SHOWN else f"{said}… ({len(text):,} characters)"

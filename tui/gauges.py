"""Formats figures and progress as short texts."""

from __future__ import annotations

from tui.messages import Figures, Loading, Reading

BAR, WIDE = 12, 96
FULL, EMPTY = "━", "╌"


def gauges(f: Figures, context: int, memory_limit_bytes: int, room: int) -> str:
    """The figures in at most ``room`` columns: as many as fit, the most wanted first, in a fixed order.

    Speeds in tokens a second; the wait for the first token; context used of its maximum; tokens that needed no
    reading; memory at its peak of what the machine should give, and what snapshots take of it.
    """
    wide = room >= WIDE
    parts = [
        (1, _speeds(f, wide)),
        (2, f"first {seconds(f.time_to_first_token_s)}"),
        (0, f"{'context ' if wide else ''}{short(f.context_tokens, wide)}/{short(context, wide)}"),
        (4, f"{short(f.reused_tokens, wide)} reused" if f.reused_tokens else ""),
        (3, _memory(f, memory_limit_bytes) if f.peak_memory_bytes else ""),
    ]
    chosen: list[tuple[int, str]] = []
    for index in sorted((i for i, part in enumerate(parts) if part[1]), key=lambda i: parts[i][0]):
        tried = sorted([*chosen, (index, parts[index][1])])
        if len(" · ".join(text for _, text in tried)) <= room:
            chosen = tried
    return " · ".join(text for _, text in chosen)


def _speeds(f: Figures, wide: bool) -> str:
    """The speed of reading is left out where nothing had to be read."""
    if wide:
        return f"{f'read {f.prompt_tps:,.0f} tok/s · ' if f.prompt_tps else ''}write {f.generation_tps:,.0f} tok/s"
    return f"{f'read {f.prompt_tps:.0f} ' if f.prompt_tps else ''}write {f.generation_tps:.0f} tok/s"


def _memory(f: Figures, limit_bytes: int) -> str:
    cache = f" + {f.cache_bytes / 1e9:.1f}" if f.cache_bytes >= 5e7 else ""
    of = f"/{limit_bytes / 1e9:.0f}" if limit_bytes else ""
    return f"{(f.peak_memory_bytes - f.cache_bytes if cache else f.peak_memory_bytes) / 1e9:.1f}{cache}{of} GB"


def reading_text(message: Reading) -> str:
    """How far a prompt has been read, the tokens that were reused, and the time left."""
    reused = f" · {message.reused:,} reused" if message.reused else ""
    eta = f" · {seconds(message.eta_s)} left" if message.eta_s and message.done < message.total else ""
    return f"reading {bar(message.done, message.total)} {message.done:,} of {message.total:,} tokens{reused}{eta}"


def loading_text(message: Loading) -> str:
    return f"loading {bar(message.done, message.total)}" if message.total else "loading the model"


def bar(done: int, total: int) -> str:
    """A bar of `BAR` columns, which needs no colour."""
    filled = BAR * done // total if total else 0
    return FULL * filled + EMPTY * (BAR - filled)


def seconds(s: float) -> str:
    """A duration in few characters."""
    if s < 10:
        return f"{s:.2f} s" if s < 1 else f"{s:.1f} s"
    return f"{s:.0f} s" if s < 120 else f"{s / 60:.0f} min"


def short(tokens: int, wide: bool = False) -> str:
    """A count in full, or in at most five characters."""
    if wide or tokens < 10_000:
        return f"{tokens:,}" if wide else str(tokens)
    return f"{tokens / 1000:.0f}k"

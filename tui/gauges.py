"""Formats figures and progress as short texts."""

from __future__ import annotations

from collections.abc import Sequence

from tui.messages import Figures, Loading, Reading

BAR, GB, LEAST_SHOWN = 12, 1e9, 5e7
FULL, EMPTY = "━", "╌"


def gauges(f: Figures, context: int, memory_limit_bytes: int, room: int) -> str:
    """The figures in at most ``room`` columns: as many as fit, the most wanted first, in a fixed order.

    Speeds in tokens a second; the wait for the first token; context used of its maximum; tokens that needed no
    reading; tokens a step where there are several; memory at its peak of what the machine should give, and what snapshots take of
    it. Most have shorter forms.
    """
    parts = [
        (1, _speeds(f)),
        (2, (f"first {seconds(f.time_to_first_token_s)}",)),
        (0, (f"context {f.context_tokens:,}/{context:,}", f"{short(f.context_tokens)}/{short(context)}")),
        (4, (f"{f.reused_tokens:,} reused", f"{short(f.reused_tokens)} reused") if f.reused_tokens else ()),
        (5, (f"{f.tokens_a_step:.1f} tokens a step",) if f.accepted_tokens else ()),
        (3, _memory(f, memory_limit_bytes) if f.peak_memory_bytes else ()),
    ]
    order = sorted((i for i, (_, forms) in enumerate(parts) if forms), key=lambda i: parts[i][0])
    chosen: dict[int, str] = {}
    for i in order:  # the shortest forms, so that much is seen
        _add(chosen, i, parts[i][1][-1:], room)
    for i in sorted(chosen, reverse=True):  # memory first: its numbers say least without words
        _add(chosen, i, parts[i][1], room)
    return _line(chosen)


def _add(chosen: dict[int, str], index: int, forms: tuple[str, ...], room: int) -> None:
    """Show a part in its first form for which there is room."""
    fitting = (form for form in forms if len(_line({**chosen, index: form})) <= room)
    if (form := next(fitting, None)) is not None:
        chosen[index] = form


def _line(chosen: dict[int, str]) -> str:
    return " · ".join(text for _, text in sorted(chosen.items()))


def _speeds(f: Figures) -> tuple[str, ...]:
    """The speed of reading is left out where nothing had to be read."""
    write = f"write {f.generation_tps:,.0f} tok/s"
    return tuple(f"read {f.prompt_tps:,.0f} {s}{write}" for s in ("tok/s · ", "")) if f.prompt_tps else (write,)


def _memory(f: Figures, limit_bytes: int) -> tuple[str, ...]:
    used, limit = f"{f.peak_memory_bytes / GB:.1f}", f"{limit_bytes / GB:.0f}"
    memory = f"memory {used} of {limit} GB" if limit_bytes else f"memory {used} GB"
    snapshots = f", snapshots {f.cache_bytes / GB:.1f}" if f.cache_bytes >= LEAST_SHOWN else ""
    return (f"{memory}{snapshots}", memory, f"{used}/{limit} GB" if limit_bytes else f"{used} GB")


def fitted(forms: Sequence[str], room: int) -> str:
    """The first form that fits, or as many words of the last as fit."""
    for form in forms:
        if len(form) <= room:
            return form
    words = forms[-1].split(" ")
    while words and len(" ".join(words)) > room - 1:
        words.pop()
    return f"{' '.join(words)}…"[: max(room, 0)]


def reading_forms(message: Reading) -> tuple[str, ...]:
    """How far a prompt has been read, the tokens that were reused, and the time left; shorter forms follow."""
    reused = f" · {message.reused:,} reused" if message.reused else ""
    eta = f" · {seconds(message.eta_s)} left" if message.eta_s and message.done < message.total else ""
    count, shown = f"{message.done:,} of {counted(message.total, 'token')}", bar(message.done, message.total)
    percent = f"{100 * message.done // message.total if message.total else 0} %"
    return (
        f"reading {shown} {count}{reused}{eta}",
        f"reading {shown} {count}{eta}",
        f"reading {count}{eta}",
        f"reading {percent}{eta}",
        f"reading {percent}",
    )


def reading_text(message: Reading) -> str:
    return reading_forms(message)[0]


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


def age(s: float) -> str:
    """How long ago, in words."""
    for unit, name in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if s >= unit:
            return f"{int(s / unit)} {name} ago"
    return "just now"


def counted(n: int, what: str) -> str:
    """Such as "1 turn" or "2 turns"."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def short(tokens: int) -> str:
    """A count in at most five characters."""
    return str(tokens) if tokens < 10_000 else f"{tokens / 1000:.0f}k"

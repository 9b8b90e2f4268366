"""Formats a report as a page of Markdown to paste into an issue."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

TITLE = "# ring-mlx"
TOP = ("backend", "kernels")
# GitHub takes 65,536 characters.
MOST_LINES = 40


def page(report: dict[str, Any], problems: Sequence[str]) -> str:
    """The page of a report of `report.make`, with its problems first."""
    parts = report["parts"]
    on = parts.get("machine", {}).get("found", {}).get("on", {})
    title = f"{TITLE} {on.get('ring_mlx', '?')} on {on.get('device', 'an unknown device')}"
    state = "" if report["complete"] else " It is not complete."
    lines = [title, "", f"Made on {report['date']} in {report['seconds']:.0f} s.{state}", ""]
    lines += _listed(problems) if problems else ["Nothing failed.", ""]
    for name, (heading, make) in SECTIONS.items():
        if name in parts:
            part = parts[name]
            seconds = f" ({part['seconds']} s)" if "seconds" in part else ""
            lines += [f"## {heading}{seconds}", "", *_body(make, part), ""]
            lines += [f"    {line}" for line in part.get("said", [])] + [""] * bool(part.get("said"))
    return "\n".join(lines).rstrip() + "\n"


def _body(make: Callable[[dict[str, Any]], list[str]], part: dict[str, Any]) -> list[str]:
    if "error" in part:
        return [part["error"]]
    found = part.get("found", {})
    return [f"Left out: {found['skipped']}."] if "skipped" in found else make(found)


def _machine(found: dict[str, Any]) -> list[str]:
    on, stack = found["on"], found["stack"]
    rows = [(name, on[name]) for name in TOP]
    rows += [(f["name"], f["seen"]) for f in found["findings"] if f["section"] == "machine" and f["name"] != "backend"]
    rows += [(f"tuning, {f['name']}", f["seen"]) for f in found["findings"] if f["section"] == "tuning"]
    rows += [(name, str(value)) for name, value in found["device"].items()]
    rows += [("versions", ", ".join(f"{name} {version}" for name, version in stack.items()))]
    rows += [("Python", on["python"]), ("switches", ", ".join(found["switches"]) or "none set")]
    return _table(("what", "seen"), rows)


def _rates(found: dict[str, Any]) -> list[str]:
    return [f"{found['bandwidth_gbps']:.1f} GB/s, {found['matmul_tflops']:.3g} TFLOP/s of {found['of']} products."]


def _findings(found: dict[str, Any]) -> list[str]:
    return _table(("operation", "", "seen"), [(f["name"], f["status"], f["seen"]) for f in found["findings"]])


def _operations(found: dict[str, Any]) -> list[str]:
    rows = []
    for r in found["rows"]:
        first = r["operation"], str(r["tokens"])
        if "error" in r:
            rows.append((*first, "", "", "", r["error"]))
        else:
            times = f"{r['mlx_us']:.1f}", f"{r['ours_us']:.1f}", f"{r['mlx_us'] / r['ours_us']:.2f}"
            rows.append((*first, *times, f"{r['difference']:.1e}"))
    heads = "operation", "tokens", "MLX us", "ours us", "times as fast", "difference"
    return [f"Shapes of {found['shape']}.", "", *_table(heads, rows)]


def _tuning(found: dict[str, Any]) -> list[str]:
    return [line for one in found["made"] for line in (*one["table"].splitlines(), "")]


def _bench(found: dict[str, Any]) -> list[str]:
    head = found["head"]
    size = f"{head['model']}: {head['weights_gb']:.2f} GB, {sum(found['dispatches'].values())} dispatches a token."
    return [size, "", *found["table"].splitlines()]


def _proofs(found: dict[str, Any]) -> list[str]:
    """A row a kernel, then those variants that failed."""
    kernels: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in found["entries"]:
        kernels.setdefault((str(entry.get("operation")), str(entry.get("kernel"))), []).append(entry)
    rows = []
    for names, entries in sorted(kernels.items()):
        errors = [e["error"] for e in entries if e.get("error") is not None]
        passed = sum(bool(e["passed"]) for e in entries)
        rows.append((*names, str(len(entries)), str(passed), f"{max(errors):.1e}" if errors else ""))
    failed = [f"- {e.get('kernel')} ({e.get('variant')}): {e.get('why')}" for e in found["entries"] if not e["passed"]]
    table = _table(("operation", "kernel", "variants", "passed", "largest error"), rows)
    return [*table, *([""] if failed else []), *failed[:MOST_LINES]]


SECTIONS = {
    "machine": ("Machine", _machine),
    "rates": ("Rates", _rates),
    "proofs": ("Verdicts on kernels", _proofs),
    "kernels": ("Kernels on small arrays", _findings),
    "operations": ("Kernels against MLX's operations", _operations),
    "tuning": ("What is fast here", _tuning),
    "toy": ("Speed: the packaged toy", _bench),
    "mini": ("Speed: mini's shapes", _bench),
}


def _listed(problems: Sequence[str]) -> list[str]:
    more = len(problems) - MOST_LINES
    return [
        f"**{len(problems)} failed:**",
        "",
        *(f"- {_cell(p)}" for p in problems[:MOST_LINES]),
        *([f"- and {more} more, in the JSON"] if more > 0 else []),
        "",
    ]


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return [f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines]


def _cell(text: str) -> str:
    return " ".join(str(text).replace("|", "\\|").split())[:300]

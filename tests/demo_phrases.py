"""Phrasings of the demo's conversations read backwards, by the tests that work answers out again."""

from __future__ import annotations

import re


def pattern(template, slots):
    """A template as a regular expression with its slots as groups; case of the start and the end mark are free."""
    body = re.escape(template[0].lower() + template[1:].rstrip("?."))
    for slot, values in slots.items():
        body = body.replace(rf"\{{{slot}\}}", f"(?P<{slot}>{values})", 1)
        body = body.replace(rf"\{{{slot}\}}", f"(?P={slot})")
    return re.compile(body + r"[?.]?")

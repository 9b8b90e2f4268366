"""Code addresses of a shared library as file:line, from its DWARF line tables."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Iterable
from pathlib import Path

from elftools.elf.elffile import ELFFile


@functools.lru_cache(maxsize=64)
def _lines(library: Path) -> tuple[list[int], list[str]]:
    """Addresses in rising order, and the place that begins at each."""
    rows = []
    with library.open("rb") as f:
        elf = ELFFile(f)  # type: ignore[no-untyped-call]
        if not elf.has_dwarf_info():
            return [], []
        info = elf.get_dwarf_info()
        for unit in info.iter_CUs():
            program = info.line_program_for_CU(unit)
            if program is None:
                continue
            first = 0 if program["version"] >= 5 else 1
            names = [entry.name.decode() for entry in program["file_entry"]]
            for entry in program.get_entries():
                state = entry.state
                if state is None:
                    continue
                place = "?" if state.end_sequence else f"{names[state.file - first]}:{state.line}"
                rows.append((state.address, place))
    rows.sort(key=lambda row: row[0])
    return [address for address, _ in rows], [place for _, place in rows]


def symbolize(library: Path, addresses: Iterable[int]) -> dict[int, str]:
    """The place of the call that returns to each address; '?' where nothing is known."""
    starts, places = _lines(library)
    found = {}
    for address in addresses:
        i = bisect.bisect_right(starts, address - 1) - 1
        found[address] = places[i] if i >= 0 else "?"
    return found

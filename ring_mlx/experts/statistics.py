"""Counts of cache hits, bytes read and seconds waited."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Counts:
    """Of one kind of pass; an expert is looked up once a layer and pass, and a hit is in memory already.

    Bytes may come from the system's cache of files; ``wait_s`` is the time in which computing waited for reads.
    """

    tokens: int = 0
    lookups: int = 0
    hits: int = 0
    bytes_read: int = 0
    wait_s: float = 0.0

    @property
    def hit_rate(self) -> float:
        """Hits per lookup; 0 before any."""
        return self.hits / self.lookups if self.lookups else 0.0

    @property
    def bytes_per_token(self) -> float:
        """Bytes read per token; 0 before any."""
        return self.bytes_read / self.tokens if self.tokens else 0.0

    def as_dict(self) -> dict[str, Any]:
        """All numbers, the derived ones too."""
        return asdict(self) | {"hit_rate": self.hit_rate, "bytes_per_token": self.bytes_per_token}


@dataclass
class ExpertStatistics:
    """Counts of passes over one token a row (decode) and over more (prefill), with the settings."""

    policy: str
    slots: int
    slot_bytes: int
    prefill: Counts = field(default_factory=Counts)
    decode: Counts = field(default_factory=Counts)

    def as_dict(self) -> dict[str, Any]:
        return vars(self) | {"prefill": self.prefill.as_dict(), "decode": self.decode.as_dict()}

    def reset(self) -> None:
        self.prefill, self.decode = Counts(), Counts()

    def line(self) -> str:
        """A line for people on decode, or on the prefill before anything was decoded."""
        c, read = (self.decode, "decode") if self.decode.tokens else (self.prefill, "prefill")
        total = self.prefill.bytes_read + self.decode.bytes_read
        return (
            f"Experts ({self.policy}, {self.slots} slots): {100 * c.hit_rate:.1f} % in memory, "
            f"{c.bytes_per_token / 1e6:.3f} MB read a token in {read}, {total / 1e9:.3f} GB in all, "
            f"{self.prefill.wait_s + self.decode.wait_s:.2f} s waited"
        )

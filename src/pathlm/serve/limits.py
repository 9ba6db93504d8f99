"""How much a server takes on."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of a server. A request beyond one is refused with an error that names it."""

    rows: int = 32
    """Rows that one model writes at once, at most half of them of one request"""
    queue: int = 128
    """Rows that may wait for that, those of a new request included"""
    max_prompt_tokens: int = 4096
    max_new_tokens: int = 1024
    max_branches: int = 8
    max_seconds: float | int = 120.0
    """Until an answer must be complete"""
    grace: float | int = 30.0
    """Seconds that running answers have left when the server is told to stop"""
    max_body_bytes: int = 2**20

    def __post_init__(self) -> None:
        """Refuse limits that let nothing through."""
        for field in fields(self):
            value, least = getattr(self, field.name), 0 if field.name == "grace" else 1
            if not least <= value < float("inf"):
                raise ValueError(f"{field.name}={value}: must be at least {least}")

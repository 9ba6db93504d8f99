"""What a token is called where people read it."""

from __future__ import annotations

import re
from typing import Any

# The characters that byte-level tokenizers write bytes as: printable ones as themselves, the others from 256 on.
_PRINTABLE = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
BYTE_OF = {chr(b): b for b in _PRINTABLE} | {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in _PRINTABLE)}
"""The byte that a character of a byte-level token stands for."""
_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")
"""A byte as tokenizers write it that have tokens for single bytes beside their words."""


def token_text(tokenizer: Any, token: int) -> str:
    """Return a token's text; bytes that are no whole character are written as hexadecimal escapes, so that nothing is lost."""
    text: str = tokenizer.decode([token])
    if "\N{REPLACEMENT CHARACTER}" not in text:
        return text
    symbols = tokenizer.convert_ids_to_tokens(token) if hasattr(tokenizer, "convert_ids_to_tokens") else None
    if not isinstance(symbols, str):
        return text
    if byte := _FALLBACK.fullmatch(symbols):
        return bytes.fromhex(byte[1]).decode("utf-8", "backslashreplace")
    if not set(symbols) <= BYTE_OF.keys():
        return text
    return bytes(BYTE_OF[symbol] for symbol in symbols).decode("utf-8", "backslashreplace")

"""Texts and names of nodes as a terminal or a page can show them."""

from __future__ import annotations

import unicodedata

from rich.cells import cell_len, set_cell_size

TOKEN = 24
"""Cells of a token at most, in a table."""
_MARKS = {"\n": "⏎", "\r": "␍", "\t": "⇥", "\x1b": "␛", "\x00": "␀"}


def label(node: str) -> str:
    """Return a node's name in short: `B3` for `block:3`, `OUT` for `exit`, a word as it can be read."""
    if node == "exit":
        return "OUT"
    if node.startswith("block:"):
        return "+".join(f"B{part.removeprefix('block:')}" for part in node.split("+"))
    return readable(node)


def visible(text: str) -> str:
    """Return a text that does nothing but to be read: control characters, line ends and invisible ones are shown as signs."""
    shown = "".join(_MARKS.get(c) or (c if _is_visible(c) else f"\\u{{{ord(c):x}}}") for c in text)
    return "◌" + shown if shown and unicodedata.combining(shown[0]) else shown


def readable(text: str) -> str:
    """Return a `visible` text for a terminal: where it runs from right to left, a mark keeps what stands behind it in its place."""
    shown = visible(text)
    return shown + "\u200e" if any(unicodedata.bidirectional(c) in ("R", "AL", "AN") for c in shown) else shown


def _is_visible(c: str) -> bool:
    return c == " " or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def dotted(text: str) -> str:
    """Return a text with its spaces at both ends as dots, which can be seen."""
    inner = text.strip(" ")
    begun = len(text) - len(text.lstrip(" "))
    return "·" * begun + inner + "·" * (len(text) - begun - len(inner))


def fitted(text: str, cells: int = TOKEN) -> str:
    """Return a readable text of at most so many cells, with its spaces shown at both ends."""
    shown = dotted(readable(text))
    return shown if cell_len(shown) <= cells else set_cell_size(shown, cells - 1) + "…"

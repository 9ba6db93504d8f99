"""Texts and names of nodes as a terminal or a page can show them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Spelling:
    """What a token is called where it stands among others, and what it adds to their text."""

    name: str
    """Of a token that holds a part of a character, the character and which part: `春 1/3`"""
    text: str
    """The character is spelled by the last of its tokens; `◌` stands for the others"""


BYTE = re.compile(r"\\x[89a-f][0-9a-f]")
"""A byte that is no whole character, as names of tokens have it."""


def spelled(names: Sequence[str]) -> list[Spelling]:
    """Return what neighbouring tokens spell: bytes that are a character together become that character, other ones stay escapes."""
    found = [Spelling(name, name) for name in names]
    begun: list[int] = []
    for place, name in enumerate(names):
        for sharing in ([*begun, place], [place]):  # what cannot go on may begin here
            if not begun and not BYTE.search(name):
                break
            parts = [_bytes(names[at]) for at in sharing]
            try:
                text = b"".join(parts).decode("utf-8")
            except UnicodeDecodeError as error:
                begun = sharing if error.reason == "unexpected end of data" else []
                if begun:
                    break
            else:
                for at, spelling in zip(sharing, _shared(parts, text), strict=True):
                    found[at] = spelling
                begun = []
                break
    return found


def _bytes(name: str) -> bytes:
    """Return the bytes that a name stands for; a lone surrogate's are no UTF-8."""
    return re.sub(rb"\\x([89a-f][0-9a-f])", lambda byte: bytes.fromhex(byte[1].decode()), name.encode("utf-8", "surrogatepass"))


def _shared(parts: Sequence[bytes], text: str) -> list[Spelling]:
    """Deal the characters of a text out to the tokens whose bytes it is."""
    owner = [number for number, part in enumerate(parts) for _ in part]
    names, texts, place = [""] * len(parts), [""] * len(parts), 0
    for character in text:
        width = len(character.encode("utf-8"))
        owners = sorted(set(owner[place : place + width]))
        place += width
        for count, number in enumerate(owners, start=1):
            names[number] += character if len(owners) == 1 else f"{character} {count}/{len(owners)}"
            texts[number] += character if count == len(owners) else "◌"
    return [Spelling(name, spelling) for name, spelling in zip(names, texts, strict=True)]

"""A minimal reader of R's lazy-load databases (.rdb): just enough for packages that keep text as character vectors."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

_CHARSXP, _STRSXP, _NA = 9, 16, -1


def strings(database: bytes) -> Iterator[list[str]]:
    """Yield every plain character vector of an .rdb file, in order; other objects are passed over.

    An .rdb file is a sequence of entries: the uncompressed length (4 bytes, big-endian), then a zlib stream that holds one serialised
    object in the XDR format (R Internals, section 1.8). Raises `ValueError` when the file is something else.
    """
    position = 0
    while position < len(database):
        inflate = zlib.decompressobj()
        try:
            content = inflate.decompress(database[position + 4 :]) + inflate.flush()
        except zlib.error as error:
            raise ValueError(f"not an R lazy-load database of zlib entries: {error} at byte {position}") from error
        if len(content) != struct.unpack_from(">I", database, position)[0]:
            raise ValueError(f"not an R lazy-load database: the entry at byte {position} has the wrong length")
        position = len(database) - len(inflate.unused_data)
        found = _character_vector(content)
        if found is not None:
            yield found


def _character_vector(content: bytes) -> list[str] | None:
    """Read one serialised object if it is a character vector without missing values."""
    if content[:2] != b"X\n":
        raise ValueError("not an R object in the XDR format")
    version, _, _ = struct.unpack_from(">iii", content, 2)
    position = 14
    if version == 3:
        position += 4 + struct.unpack_from(">i", content, position)[0]
    (flags,) = struct.unpack_from(">I", content, position)
    if flags & 0xFF != _STRSXP:
        return None
    (count,) = struct.unpack_from(">i", content, position + 4)
    position += 8
    values = []
    for _ in range(count):
        flags, length = struct.unpack_from(">Ii", content, position)
        if flags & 0xFF != _CHARSXP or length == _NA:
            return None
        values.append(content[position + 8 : position + 8 + length].decode("utf-8"))
        position += 8 + length
    return values

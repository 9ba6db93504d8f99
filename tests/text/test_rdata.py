import struct
import zlib

import pytest

from pathlm.text.rdata import strings


def vector(values: list[str], *, version: int = 3) -> bytes:
    content = b"X\n" + struct.pack(">iii", version, 0x30500, 0x30500) + (struct.pack(">i", 5) + b"UTF-8" if version == 3 else b"")
    content += struct.pack(">Ii", 16, len(values))
    return content + b"".join(struct.pack(">Ii", 0x00040009, len(v.encode())) + v.encode() for v in values)


def entry(content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + zlib.compress(content)


def test_character_vectors_are_read_and_other_objects_passed_over() -> None:
    number = b"X\n" + struct.pack(">iii", 2, 0, 0) + struct.pack(">Ii", 13, 1) + struct.pack(">i", 7)
    database = entry(vector(["Emma", "naïve 水", ""])) + entry(number) + entry(vector(["b"], version=2))
    assert list(strings(database)) == [["Emma", "naïve 水", ""], ["b"]]


@pytest.mark.parametrize("database", [b"\0\0\0\4nonsense", struct.pack(">I", 99) + zlib.compress(b"X\n")])
def test_something_else_is_refused(database: bytes) -> None:
    with pytest.raises(ValueError, match="not an R lazy-load database"):
        list(strings(database))

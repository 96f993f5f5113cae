"""Keys that type a text, and pictures as PNG."""

import io
import struct
import zlib

import pytest

from netorch.errors import UsageError
from netorch.keys import combination, typed
from netorch.png import png

KNOWN = frozenset({"ctrl", "alt", "delete", "ret", "a", "f2", "kp_enter"})


def test_combinations() -> None:
    assert combination("ctrl-alt-delete", KNOWN) == ("ctrl", "alt", "delete")
    assert combination("Ctrl-Alt-F2", KNOWN) == ("ctrl", "alt", "f2")
    assert combination("enter", KNOWN) == ("ret",)
    with pytest.raises(UsageError, match="there is no key 'delet' in 'ctrl-delet'") as raised:
        combination("ctrl-delet", KNOWN)
    assert raised.value.hint == "perhaps delete"
    with pytest.raises(UsageError, match="there is no key ''"):
        combination("ctrl-", KNOWN)


def test_texts() -> None:
    assert list(typed("aB 1!-_\\n\\\\\\x")) == [
        ("a",),
        ("shift", "b"),
        ("spc",),
        ("1",),
        ("shift", "1"),
        ("minus",),
        ("shift", "minus"),
        ("ret",),
        ("backslash",),
        ("backslash",),
        ("x",),
    ]
    printable = bytes(range(32, 127)).decode().replace("\\", "")
    assert len({keys for character in printable for keys in typed(character)}) == len(printable)
    with pytest.raises(UsageError, match="no key of a US keyboard types 'é'"):
        list(typed("café"))


def test_a_picture_is_the_same_as_png() -> None:
    width, height = 5, 300
    pixels = bytes(n * 7 % 256 for n in range(width * height * 3))
    made = b"".join(png(io.BytesIO(b"P6\n%d %d\n255\n" % (width, height) + pixels)))
    assert decoded(made) == (width, height, pixels)


@pytest.mark.parametrize("text", [b"", b"P5\n1 1\n255\n0", b"P6\n1 1\n65535\n000000"])
def test_what_is_no_picture(text: bytes) -> None:
    with pytest.raises(ValueError, match="not a PPM picture"):
        list(png(io.BytesIO(text)))


def test_a_picture_that_is_cut_off() -> None:
    with pytest.raises(ValueError, match="ends in row 1 of 2"):
        list(png(io.BytesIO(b"P6\n1 2\n255\n0123")))


def decoded(data: bytes) -> tuple[int, int, bytes]:
    """Width, height and pixels of a PNG whose rows have no filter; its checksums are checked."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, []
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", data, at + 8 + length)[0] == zlib.crc32(kind + body)
        chunks.append((kind, body))
        at += 12 + length
    assert [chunks[0][0], chunks[-1]] == [b"IHDR", (b"IEND", b"")]
    width, height, *rest = struct.unpack(">II5B", chunks[0][1])
    assert rest == [8, 2, 0, 0, 0]
    rows = zlib.decompress(b"".join(body for kind, body in chunks if kind == b"IDAT"))
    step = 3 * width + 1
    assert len(rows) == height * step
    assert set(rows[::step]) == {0}
    return width, height, b"".join(rows[n * step + 1 : (n + 1) * step] for n in range(height))

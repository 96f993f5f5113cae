"""PNG from PPM, which is what every QEMU writes of a screen: pure.

QEMU writes PNG itself only since 7.1, and where it was built with libpng. This takes a filter and
zlib, so there is one way for all of them. The formats: ppm(5), and the PNG specification, chapters
5 and 11 (signature, IHDR, IDAT, IEND; colour type 2, a filter byte of 0 before each row).
"""

import struct
import zlib
from collections.abc import Iterator
from typing import IO

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TRUECOLOUR = 2


def png(ppm: IO[bytes]) -> Iterator[bytes]:
    """The picture as PNG, in parts, a row of it in memory at a time.

    `ppm` is at its start, binary (P6), with a byte for each colour. Raises ValueError.
    """
    header = [ppm.readline(32).split() for _line in range(3)]
    match header:
        case [[b"P6"], [w, h], [b"255"]]:
            width, height = int(w), int(h)
        case _:
            raise ValueError(f"not a PPM picture of 8 bits: {header}")
    depth_and_colour = (8, _TRUECOLOUR, 0, 0, 0)
    yield _SIGNATURE + _chunk(b"IHDR", struct.pack(">II5B", width, height, *depth_and_colour))
    deflate = zlib.compressobj()
    for number in range(height):
        row = ppm.read(3 * width)
        if len(row) != 3 * width:
            raise ValueError(f"the picture ends in row {number} of {height}")
        if data := deflate.compress(b"\0" + row):
            yield _chunk(b"IDAT", data)
    yield _chunk(b"IDAT", deflate.flush()) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

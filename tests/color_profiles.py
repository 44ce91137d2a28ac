"""ICC profiles that cameras and scanners write, made here from their primaries and gammas."""

from __future__ import annotations

import struct

WHITE = (0.9642, 1.0, 0.8249)  # D50, which profiles refer to
# X, Y, Z of red, green and blue
DISPLAY_P3 = ((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))
ADOBE_RGB = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))


def xyz(values: tuple[float, float, float]) -> bytes:
    """An ICC tag of one colour."""
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))


def text(name: str) -> bytes:
    """An ICC tag of one text."""
    encoded = name.encode("utf-16-be")
    return b"mluc\0\0\0\0" + struct.pack(">2I4s2I", 1, 12, b"enUS", len(encoded), 28) + encoded


def profile(kind: str, gamma: float, primaries=()) -> bytes:
    """The profile of a kind of colours, "RGB " or "GRAY": values are powers of light."""
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))
    tags = {"desc": text("of a test"), "cprt": text("free"), "wtpt": xyz(WHITE)}
    for color, values in zip("rgb", primaries):
        tags |= {f"{color}XYZ": xyz(values), f"{color}TRC": curve}
    tags |= {} if primaries else {"kTRC": curve}
    table, body, start = b"", b"", 132 + 12 * len(tags)
    for name, tag in tags.items():
        tag += b"\0" * (-len(tag) % 4)
        table += struct.pack(">4s2I", name.encode(), start + len(body), len(tag))
        body += tag
    head = struct.pack(">4xI4s4s4s12x4s28x", 0x04200000, b"mntr", kind.encode(), b"XYZ ", b"acsp")
    head += struct.pack(">3i48xI", *(round(value * 65536) for value in WHITE), len(tags))
    whole = head + table + body
    return struct.pack(">I", 4 + len(whole)) + whole

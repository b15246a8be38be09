"""ICC profiles of RGB displays, made by rule."""

import struct
from typing import Final

# Red, green and blue of Display P3 and of sRGB in XYZ, adapted to D50, as their profiles have them.
P3: Final = ((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))
SRGB: Final = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.7141))


def display_profile(colorants: tuple[tuple[float, ...], ...], name: str, space: bytes = b"RGB ") -> bytes:
    """A version 4 matrix profile with the tone curve of sRGB."""
    curve = b"para" + bytes(4) + struct.pack(">HH", 3, 0) + _fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    text = name.encode("utf-16-be")
    described = b"mluc" + bytes(4) + struct.pack(">II", 1, 12) + b"enUS" + struct.pack(">II", len(text), 28) + text
    tags = {b"desc": described, b"cprt": described, b"wtpt": b"XYZ " + bytes(4) + _fixed(0.9642, 1.0, 0.8249)}
    for letter, colorant in zip("rgb", colorants, strict=True):
        tags |= {f"{letter}XYZ".encode(): b"XYZ " + bytes(4) + _fixed(*colorant), f"{letter}TRC".encode(): curve}
    table, content = struct.pack(">I", len(tags)), b""
    for tag, body in tags.items():
        table += tag + struct.pack(">II", 132 + 12 * len(tags) + len(content), len(body))
        content += body + bytes(-len(body) % 4)
    size = 132 + 12 * len(tags) + len(content)
    fields = struct.pack(">I4sI4s4s4s", size, bytes(4), 0x04000000, b"mntr", space, b"XYZ ")
    header = fields + bytes(12) + b"acsp" + bytes(28) + _fixed(0.9642, 1.0, 0.8249)
    return header + bytes(128 - len(header)) + table + content


def _fixed(*numbers: float) -> bytes:
    return b"".join(struct.pack(">i", round(number * 65536)) for number in numbers)

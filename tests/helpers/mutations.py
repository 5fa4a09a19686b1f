"""Damaged files for tests of what reads them."""

import random


def mutated(content: bytes, draw: random.Random) -> bytes:
    """Returns the content with one random change of any kind."""
    start, length = draw.randrange(len(content) + 1), draw.choice([1, 1, 2, 8, 40])
    end = start + length
    word = draw.choice([b"0", b"9", b"-", b'"', b"[", b"null", b"\n", b"\x00"])
    new = draw.choice([b"", draw.randbytes(length), word])
    return draw.choice(
        [
            content[:start],
            content[:start] + new + content[end:],
            content[:start] + new + content[start:],
            content[:start] + content[start:end] * 2 + content[end:],
            content[:start] + bytes([byte ^ 1 << draw.randrange(8) for byte in content[start : start + 1]])
            + content[start + 1 :],
        ]
    )  # fmt: skip

"""Random damage of bytes, of JSON values and of numbers; all of it a function of the generator that is given."""

from __future__ import annotations

import copy
import json
import random
import struct
from typing import Any

NUMBERS = (0, -1, 1, 2, 7, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30)
FLOATS = (0.0, -0.0, 0.5, 1e308, -1e308, 5e-324, float("inf"), float("-inf"), float("nan"), 1e-300)
TEXTS = ("", "float32", "none", "full", "\x1b[2J\x1b]0;x\x07", "\u202e", "\ud800", "a\nb", "x" * 3000, "__metadata__")
OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], {"a": None}, [0] * 50)


def damaged(rng: random.Random, data: bytes, other: bytes = b"") -> bytes:
    """Bytes with one to four changes: bits, runs, numbers, lengths, pieces of another file."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(out) + 1)
        length = min(rng.choice((1, 2, 4, 8, 64, 1024)), len(out) - at)
        kind = rng.randrange(8)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at : at + length] = rng.randbytes(length)
        elif kind == 2:
            number = struct.pack("<Q", rng.choice(NUMBERS) % 2**64)[: rng.choice((2, 4, 8))]
            out[at : at + len(number)] = number
        elif kind == 3:
            del out[at : at + length]
        elif kind == 4:
            out[at:at] = out[at : at + length]
        elif kind == 5:
            del out[at:]
        elif kind == 6:
            out[at:at] = bytes(length)
        elif other:
            start = rng.randrange(len(other))
            out[at : at + length] = other[start : start + length]
    return bytes(out)


def nasty(rng: random.Random, like: Any = None) -> Any:
    """A JSON value that a reader may not have thought of, often of the same type."""
    if type(like) is int and rng.random() < 0.5:
        return rng.choice((like + 1, like - 1, -like, like * 2, like + 2**64, float(like), str(like)))
    if isinstance(like, list) and like and rng.random() < 0.5:
        return rng.choice((like[:-1], like + like[:1], like[::-1], [like], like * 40, like[0]))
    return copy.deepcopy(rng.choice((*NUMBERS, *FLOATS, *TEXTS, *OTHERS)))


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) within a JSON value."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    found = [(value, key) for key in keys]
    return found + [place for key in keys for place in places(value[key])]


def changed(rng: random.Random, value: Any) -> Any:
    """A copy of a JSON value with an entry replaced, removed, renamed or moved."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 2))):
        found = places(value)
        if not found:
            return nasty(rng, value)
        container, key = rng.choice(found)
        kind = rng.randrange(6)
        if kind == 0:
            del container[key]
        elif kind == 1 and isinstance(container, dict):
            container[rng.choice(TEXTS)] = container.pop(key)
        elif kind == 2:
            other, at = rng.choice(found)
            container[key] = json.loads(json.dumps(other[at]))
        else:
            container[key] = nasty(rng, container[key])
    return value


def text_of(rng: random.Random, value: Any) -> bytes:
    """A JSON text, at times one that is damaged, repeats a key or nests without end."""
    text = json.dumps(value).encode()
    kind = rng.randrange(12)
    if kind == 0:
        return damaged(rng, text)
    if kind == 1:
        return text[:-1] + b"," + text[1:]
    if kind == 2:
        return text.replace(b"[", b"[" * rng.choice((2, 2000)), 1)
    return text

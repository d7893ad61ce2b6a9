"""Format of state files: safetensors, whose metadata contain a JSON header and a checksum of the whole file.

    u64 n | n bytes JSON {"__metadata__": {"checksum": 64 digits, "header": JSON text}, name: {...}, ...} | tensors

The checksum is SHA-256 of all bytes except its own digits, which come first, so that it is verified before anything
else is trusted. The files can be read by any safetensors reader. `parse` accepts only files that `pack` can have
written and checks names, dtypes, shapes and offsets itself, because the safetensors package copies every tensor and
accepts unaligned tensors and repeated keys.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from reprlib import repr as brief
from typing import Any, TypeAlias

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

MAX_HEADER = 2**24  # bytes; a parsed header takes about 20 times as much memory
MAX_DIMS = 16
DIGITS = 64

_PREFIX = b'{"__metadata__":{"checksum":"'


class Damaged(Exception):
    """The file is damaged; the text says how and follows the file's name."""


# A tensor's dtype, shape, and first and past-the-end offset in the bytes after the header.
Entry: TypeAlias = tuple[torch.dtype, tuple[int, ...], int, int]


def checksum(parts: Iterable[bytes | memoryview]) -> bytes:
    """Return the hexadecimal digest of the concatenated parts.

    Example:
        >>> checksum([b"ab", b"c"]) == checksum([b"abc"])
        True
    """
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest().encode()


def pack(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> list[bytes | memoryview]:
    """Return the bytes of a file in parts; those of contiguous CPU tensors are views.

    Raises:
        TypeError: the header is not JSON serializable, or a value is not a tensor.
        ValueError: a tensor is not dense or has an unsupported dtype, or the header exceeds MAX_HEADER.
    """
    entries: dict[str, Any] = {}
    views: list[bytes | memoryview] = []
    stop = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        if name == "__metadata__" or not _is_unicode(name):
            raise ValueError(f"write: tensor {brief(name)} must have another name")
        if tensor.dtype not in _NAMES or tensor.layout != torch.strided:
            raise ValueError(f"write: tensor {brief(name)} must be dense and {', '.join(DTYPES)}, got {tensor.dtype}")
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        view = flat.view(torch.uint8).numpy().data
        start, stop = stop, stop + view.nbytes
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
        views.append(view)
    metadata = {"checksum": "0" * DIGITS, "header": json.dumps(dict(header))}
    text = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise ValueError(f"write: header must take at most {MAX_HEADER} bytes, got {len(text)}")
    before = len(text).to_bytes(8, "little") + _PREFIX
    after = text[len(_PREFIX) + DIGITS :]
    return [before, checksum([before, after, *views]), after, *views]


def header_length(start: bytes, file_size: int) -> int:
    """Return the size of the JSON text from the first 8 bytes of a file, or raise Damaged."""
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > file_size - 8:
        raise Damaged("it is truncated, or no state file")
    if length > MAX_HEADER or length % 8:
        raise Damaged(f"its header must take at most {MAX_HEADER} bytes and a multiple of 8, got {length}")
    return length


def parse(text: bytes, data_size: int) -> tuple[dict[str, Entry], dict[str, Any]]:
    """Return the entries and the header of a file whose tensors take data_size bytes, or raise Damaged."""
    if not text.startswith(_PREFIX):
        raise Damaged("it is no state file")
    try:
        entries = json.loads(text, object_pairs_hook=_distinct)
        metadata = entries.pop("__metadata__")
        header = json.loads(metadata["header"], object_pairs_hook=_distinct)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise Damaged(f"its header cannot be read: {type(error).__name__}: {brief(str(error))}") from None
    if not isinstance(header, dict) or metadata.keys() != {"checksum", "header"}:
        raise Damaged("its metadata must be a checksum and a header")
    found: dict[str, Entry] = {}
    stop = 0
    for name, entry in entries.items():
        found[name] = _entry(name, entry, stop)
        stop = found[name][-1]
    if stop != data_size:
        raise Damaged(f"its tensors must take the {data_size} bytes that follow the header, got {stop}")
    return found, header


def _is_unicode(name: str) -> bool:
    """Return whether the name is valid Unicode: JSON allows unpaired surrogates, other readers do not."""
    return not any("\ud800" <= c <= "\udfff" for c in name)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key is repeated")
    return result


def _entry(name: str, entry: Any, start: int) -> Entry:
    """Return the entry, which must begin at `start` and have the size of its shape."""
    if not _is_unicode(name):
        raise Damaged(f"tensor {brief(name)} must have a name in Unicode")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise Damaged(f"tensor {brief(name)} must have dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise Damaged(f"tensor {brief(name)} must be {', '.join(DTYPES)}, got {brief(code)}")
    numbers = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
    if not numbers or not all(type(n) is int and 0 <= n < 2**62 for n in (*shape, *offsets)):
        raise Damaged(f"tensor {brief(name)} must have a shape and two offsets, got {brief((shape, offsets))}")
    # The strides of an empty tensor are products of its other extents.
    if len(shape) > MAX_DIMS or math.prod(max(n, 1) for n in shape) >= 2**62:
        raise Damaged(f"tensor {brief(name)} has an impossible shape {brief(shape)}")
    dtype = DTYPES[code]
    if start % dtype.itemsize or offsets != [start, start + math.prod(shape) * dtype.itemsize]:
        raise Damaged(f"tensor {brief(name)} of shape {brief(shape)} does not fit its offsets {offsets}")
    return dtype, tuple(shape), *offsets


def unpack(start: bytes, text: bytes, data: bytearray, entries: Mapping[str, Entry]) -> dict[str, Tensor]:
    """Return the tensors, which are views of data, after verifying the checksum of start, text and data.

    Raises:
        Damaged: the checksum is wrong, or a bool is neither 0 nor 1.
    """
    at = len(_PREFIX)
    if checksum([start, text[:at], text[at + DIGITS :], memoryview(data)]) != text[at : at + DIGITS]:
        raise Damaged("its checksum is wrong: it was damaged or changed")
    tensors = {}
    for name, (dtype, shape, first, stop) in entries.items():
        if first == stop:
            tensors[name] = torch.empty(shape, dtype=dtype, device="cpu")
            continue
        flat = torch.frombuffer(data, dtype=torch.uint8, count=stop - first, offset=first)
        if dtype == torch.bool and int(flat.max()) > 1:
            raise Damaged(f"tensor {brief(name)} must hold 0 and 1 alone")
        tensors[name] = flat.view(dtype).reshape(shape)
    return tensors

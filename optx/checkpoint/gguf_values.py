"""GGUF's typed metadata values, and how Python values become them.

Type numbers are those of `gguf_metadata_value_type` in ggml's `docs/gguf.md`.
"""

import struct

import numpy as np

from optx.errors import FormatError

BOOL, STRING, ARRAY = 7, 8, 9
UINT32, INT32, FLOAT32, UINT64, INT64, FLOAT64 = 4, 5, 6, 10, 11, 12

# The number types' struct codes.
STRUCTS: dict[int, str] = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}

_KIND_OF_DTYPE = {np.dtype(code): kind for kind, code in STRUCTS.items()} | {np.dtype(bool): BOOL}
_FLOAT32_MAX = float(np.finfo(np.float32).max)


def pack_string(text: str) -> bytes:
    """Length in bytes as uint64, then UTF-8."""
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise FormatError(f"string {text[:40]!r}: got a lone surrogate, allowed: what UTF-8 can hold") from error
    return struct.pack("<Q", len(data)) + data


def pack_value(value: object, what: str) -> bytes:
    """A metadata value with its type in front.

    bool, str and lists map to their own types; an int is uint32, else int32, else 64 bits wide; a float is float32
    unless too large; a list of ints is int32, else 64 bits. NumPy scalars and arrays keep their dtype.
    Raises FormatError, naming `what`, for anything else.
    """
    kind = _kind(value, what)
    return struct.pack("<I", kind) + _pack(value, kind, what)


def _pack(value: object, kind: int, what: str) -> bytes:
    if kind == STRING:
        return pack_string(value)
    if kind == BOOL:
        return struct.pack("<?", value)
    if kind != ARRAY:
        return struct.pack("<" + STRUCTS[kind], value)
    items = list(value)
    item_kind = _item_kind(value, items, what)
    head = struct.pack("<IQ", item_kind, len(items))
    if item_kind in STRUCTS:
        return head + struct.pack(f"<{len(items)}{STRUCTS[item_kind]}", *items)
    return head + b"".join(_pack(item, item_kind, what) for item in items)


def _kind(value: object, what: str) -> int:
    if isinstance(value, np.generic) and value.dtype in _KIND_OF_DTYPE:
        return _KIND_OF_DTYPE[value.dtype]
    if isinstance(value, bool):
        return BOOL
    if isinstance(value, str):
        return STRING
    if isinstance(value, list | tuple | np.ndarray):
        return ARRAY
    if isinstance(value, int | float):
        return _number_kind([value], UINT32, what)
    raise FormatError(f"{what}: got {type(value).__name__}, allowed: bool, int, float, str and lists of one of them")


def _item_kind(value: object, items: list, what: str) -> int:
    """The one type that all items of an array have."""
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype in _KIND_OF_DTYPE:
        return _KIND_OF_DTYPE[value.dtype]
    kinds = {_kind(item, what) for item in items}
    if len(kinds) == 1 and kinds <= {BOOL, STRING, ARRAY}:
        return kinds.pop()
    if kinds & {BOOL, STRING, ARRAY}:
        raise FormatError(f"{what}: got a list of mixed types, allowed: items of one type")
    return _number_kind(items, INT32, what)


def _number_kind(numbers: list, first: int, what: str) -> int:
    """`first` or the narrowest wider type that holds all the numbers."""
    if any(isinstance(number, float | np.floating) for number in numbers):
        finite = [abs(number) for number in numbers if np.isfinite(number)]
        return FLOAT64 if max(finite, default=0.0) > _FLOAT32_MAX else FLOAT32
    low, high = min(numbers, default=0), max(numbers, default=0)
    for kind in (first, INT32, INT64, UINT64):
        limits = np.iinfo(np.dtype(STRUCTS[kind]))
        if limits.min <= low and high <= limits.max:
            return kind
    raise FormatError(f"{what}: got integers from {low} to {high}, allowed: what fits 64 bits")

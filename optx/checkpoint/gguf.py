"""GGUF files: a header that is checked before anything is believed, tensors that are read one at a time.

Layout (ggml's `docs/gguf.md`, versions 2 and 3, little endian): magic, version, number of tensors, number of
key-values; the key-values; for each tensor its name, dimensions (fastest first), type and offset; padding to
`general.alignment`; the tensors' bytes. A header comes from a stranger: every count is compared with the bytes that
are left in the file before anything is allocated for it.
"""

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np

from optx.checkpoint.gguf_values import ARRAY, BOOL, STRING, STRUCTS, pack_string, pack_value
from optx.errors import CheckpointError, FormatError
from optx.ggml import BLOCKS, BLOCKS_BY_ID, PLAIN, PLAIN_BY_ID, UNSUPPORTED_BY_ID, Block, Plain

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4  # GGML_MAX_DIMS
MAX_NAME = 65535  # bytes, of keys and tensor names
MAX_ENTRIES = 1 << 20  # tensors, and key-values
MAX_ITEMS = 1 << 24  # of one array; the largest vocabulary so far has 2^18
MAX_NESTING = 4  # arrays in arrays


@dataclass(frozen=True, kw_only=True)
class GGUFTensor:
    """Where one tensor lies in a file, and what it is."""

    path: Path
    name: str
    shape: tuple[int, ...]  # logical, row-major: GGUF's dimensions reversed; blocks run along the last axis
    type: str  # a key of BLOCKS or PLAIN
    offset: int  # bytes from the start of the file
    nbytes: int

    def read(self) -> np.ndarray:
        """The tensor's bytes and no others: its dtype and shape, or uint8[*shape[:-1], row bytes] for a block type."""
        try:
            raw = np.fromfile(self.path, np.uint8, self.nbytes, offset=self.offset)
        except OSError as error:
            raise CheckpointError(f"{self.path}: tensor {self.name!r} cannot be read: {error}") from error
        if raw.size != self.nbytes:
            raise CheckpointError(
                f"{self.path}: tensor {self.name!r}: got {raw.size} of {self.nbytes} bytes at {self.offset}; "
                "the file got shorter since its header was read"
            )
        if self.type in PLAIN:
            return raw.view(PLAIN[self.type].dtype).reshape(self.shape)
        return raw.reshape(*self.shape[:-1], -1)


@dataclass(frozen=True, kw_only=True)
class GGUFFile:
    """A file's header. Metadata values are bool, int, float, str or (nested) lists of one of them."""

    path: Path
    version: int
    alignment: int  # bytes
    metadata: dict[str, object]
    tensors: dict[str, GGUFTensor]  # in the order of the file


def read_gguf(path: str | os.PathLike) -> GGUFFile:
    """The header of a GGUF file; no tensor is read.

    Raises CheckpointError, with the file, what was read and what is allowed, for a file that is missing, truncated,
    of another version or byte order, or whose header contradicts itself or the file's size.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            return _read_header(_Cursor(file, path, os.fstat(file.fileno()).st_size))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read a GGUF file here: {error.strerror or error}") from error


class _Cursor:
    """Reads little-endian values in order and never past the end of the file."""

    def __init__(self, file: BinaryIO, path: Path, size: int):
        self.file, self.path, self.size, self.at = file, path, size, 0

    def fail(self, what: str, got: object, allowed: object) -> NoReturn:
        raise CheckpointError(
            f"{self.path}: {what}: got {got}, allowed: {allowed} (near byte {self.at} of {self.size}); "
            "fetch the file again or convert the model anew"
        )

    def take(self, count: int, what: str) -> bytes:
        left = self.size - self.at
        if count > left:
            self.fail(what, f"{count} bytes", f"the {left} bytes left in the file")
        data = self.file.read(count)
        if len(data) != count:
            self.fail(what, f"{len(data)} bytes", f"{count}; the file got shorter while it was read")
        self.at += count
        return data

    def number(self, code: str, what: str) -> int | float:
        layout = struct.Struct("<" + code)
        return layout.unpack(self.take(layout.size, what))[0]

    def count(self, item_bytes: int, what: str, most: int = 1 << 63) -> int:
        """A uint64 that says how many items of at least `item_bytes` follow."""
        count = self.number("Q", what)
        most = min(most, (self.size - self.at) // item_bytes)
        if count > most:
            self.fail(what, count, f"at most {most}")
        return count

    def string(self, what: str, most: int = 1 << 63) -> str:
        return self.text(self.take(self.count(1, f"length of {what}", most), what), what)

    def text(self, data: bytes, what: str) -> str:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            self.fail(what, repr(data[:40]), f"UTF-8 ({error.reason})")

    def strings(self, count: int, what: str) -> list[str]:
        """As `string`, `count` times, without a call for each check: a vocabulary has 262,144 of them."""
        read, size, at, texts = self.file.read, self.size, self.at, []
        for _ in range(count):
            length = int.from_bytes(read(8), "little")
            at += 8 + length
            if at > size:
                self.at = min(at - length, size)
                self.fail(f"length of a string in {what}", length, f"at most {size - self.at}")
            texts.append(self.text(read(length), what))
        self.at = at
        return texts

    def flags(self, count: int, what: str) -> list[bool]:
        data = self.take(count, what)
        if count and max(data) > 1:
            self.fail(what, f"the byte {max(data)} as a bool", "0 or 1")
        return [bool(byte) for byte in data]

    def value(self, kind: int, what: str, depth: int = 0) -> object:
        """One metadata value of GGUF value type `kind`."""
        if kind == STRING:
            return self.string(what)
        if kind == BOOL:
            return self.flags(1, what)[0]
        if kind == ARRAY:
            return self.array(what, depth + 1)
        if kind not in STRUCTS:
            self.fail(f"type of {what}", kind, "0 to 12")
        return self.number(STRUCTS[kind], what)

    def array(self, what: str, depth: int) -> list:
        if depth > MAX_NESTING:
            self.fail(f"nesting of {what}", depth, f"at most {MAX_NESTING} arrays in each other")
        kind = self.number("I", f"item type of {what}")
        least = {STRING: 8, BOOL: 1, ARRAY: 12}
        if kind not in least and kind not in STRUCTS:
            self.fail(f"item type of {what}", kind, "0 to 12")
        width = least.get(kind) or struct.calcsize("<" + STRUCTS[kind])
        count = self.count(width, f"length of {what}", MAX_ITEMS)
        if kind == BOOL:
            return self.flags(count, what)
        if kind in STRUCTS:
            return list(struct.unpack(f"<{count}{STRUCTS[kind]}", self.take(count * width, what)))
        if kind == STRING:
            return self.strings(count, what)
        return [self.array(what, depth + 1) for _ in range(count)]


def _read_header(cursor: _Cursor) -> GGUFFile:
    magic = cursor.take(4, "magic")
    if magic != MAGIC:
        cursor.fail("magic", repr(magic), f"{MAGIC!r} (is this a GGUF file?)")
    version = cursor.number("I", "version")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        got = f"{swapped} in big-endian order" if swapped in VERSIONS else version
        cursor.fail("version", got, "2 or 3, little endian")
    n_tensors = cursor.count(24, "number of tensors", MAX_ENTRIES)
    n_values = cursor.count(13, "number of key-values", MAX_ENTRIES)
    metadata = _read_metadata(cursor, n_values)
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not _is_alignment(alignment):
        cursor.fail("general.alignment", repr(alignment), "a power of two")
    infos = [_read_info(cursor) for _ in range(n_tensors)]
    start = _aligned(cursor.at, alignment)
    tensors: dict[str, GGUFTensor] = {}
    for name, shape, kind, offset in infos:
        if name in tensors:
            cursor.fail("tensor name", f"{name!r} twice", "one tensor a name")
        tensors[name] = _locate(cursor, name, shape, kind, offset, start, alignment)
    return GGUFFile(path=cursor.path, version=version, alignment=alignment, metadata=metadata, tensors=tensors)


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, object]:
    metadata: dict[str, object] = {}
    for index in range(count):
        key = cursor.string(f"key {index}", MAX_NAME)
        if key in metadata:
            cursor.fail("metadata key", f"{key!r} twice", "one value a key")
        kind = cursor.number("I", f"type of metadata {key!r}")
        metadata[key] = cursor.value(kind, f"metadata {key!r}")
    return metadata


def _read_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], Block | Plain, int]:
    """One tensor's name, row-major shape, type and offset into the data section."""
    name = cursor.string("tensor name", MAX_NAME)
    what = f"tensor {name!r}"
    n_dims = cursor.number("I", f"{what}: number of dimensions")
    if n_dims > MAX_DIMS:
        cursor.fail(f"{what}: number of dimensions", n_dims, f"0 to {MAX_DIMS}")
    dims = [cursor.number("Q", f"{what}: dimension") for _ in range(n_dims)]
    if 0 in dims:
        cursor.fail(f"{what}: dimensions", dims, "at least 1 each")
    type_id = cursor.number("I", f"{what}: type")
    kind = BLOCKS_BY_ID.get(type_id) or PLAIN_BY_ID.get(type_id)
    if kind is None:
        got = f"{UNSUPPORTED_BY_ID.get(type_id, 'unknown')} (id {type_id})"
        cursor.fail(f"{what}: type", got, ", ".join([*PLAIN, *BLOCKS]))
    return name, tuple(reversed(dims)), kind, cursor.number("Q", f"{what}: offset")


def _locate(
    cursor: _Cursor, name: str, shape: tuple[int, ...], kind: Block | Plain, offset: int, start: int, alignment: int
) -> GGUFTensor:
    """The tensor with its place in the file checked; `offset` counts from the data section's `start`."""
    what = f"tensor {name!r}"
    nbytes = _nbytes(shape, kind)
    if nbytes is None:
        cursor.fail(f"{what}: last axis of {shape}", shape[-1:], f"a multiple of {kind.name}'s {kind.elements}")
    if offset % alignment:
        cursor.fail(f"{what}: offset", offset, f"a multiple of the alignment {alignment}")
    if start + offset + nbytes > cursor.size:
        got = f"{nbytes} bytes at {start} + {offset}"
        cursor.fail(f"{what}: {kind.name} of shape {shape}", got, f"up to the file's end at {cursor.size}")
    return GGUFTensor(path=cursor.path, name=name, shape=shape, type=kind.name, offset=start + offset, nbytes=nbytes)


def _nbytes(shape: tuple[int, ...], kind: Block | Plain) -> int | None:
    """Bytes of a tensor, or None where its rows are no whole blocks."""
    elements = math.prod(shape)
    if isinstance(kind, Plain):
        return elements * kind.dtype.itemsize
    if not shape or shape[-1] % kind.elements:
        return None
    return elements // kind.elements * kind.bytes


def _is_alignment(value: object) -> bool:
    return type(value) is int and value > 0 and value & (value - 1) == 0


def _aligned(at: int, alignment: int) -> int:
    return -(-at // alignment) * alignment


def write_gguf(
    path: str | os.PathLike,
    metadata: Mapping[str, object],
    tensors: Mapping[str, np.ndarray | tuple[str, np.ndarray]],
) -> None:
    """Writes a version 3 file, whole or not at all (a temporary file beside it, then a rename).

    A tensor is an array of one of PLAIN's dtypes, or `(block type, uint8[..., row bytes])`. Metadata follows
    `gguf_values.pack_value`: ints become uint32 where they fit, floats float32, lists of ints int32; a NumPy scalar
    or array keeps its type. Raises FormatError for a value or a tensor that GGUF cannot hold.
    """
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not _is_alignment(alignment):
        raise FormatError(f"metadata 'general.alignment': got {alignment!r}, allowed: a power of two as int")
    head = [MAGIC, struct.pack("<IQQ", VERSIONS[-1], len(tensors), len(metadata))]
    head += [pack_string(key) + pack_value(value, f"metadata {key!r}") for key, value in metadata.items()]
    offset = 0
    for name, tensor in tensors.items():
        shape, kind = _describe(name, tensor)
        dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        head.append(pack_string(name) + dims + struct.pack("<IQ", kind.type_id, offset))
        offset = _aligned(offset + _nbytes(shape, kind), alignment)
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            _write_padded(file, b"".join(head), alignment)
            for tensor in tensors.values():
                data = tensor[1] if isinstance(tensor, tuple) else tensor
                _write_padded(file, np.ascontiguousarray(data).tobytes(), alignment)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _describe(name: str, tensor: np.ndarray | tuple[str, np.ndarray]) -> tuple[tuple[int, ...], Block | Plain]:
    """The logical shape and the type of a tensor to write."""
    data = tensor[1] if isinstance(tensor, tuple) else tensor
    if data.size == 0:
        raise FormatError(f"tensor {name!r}: got shape {list(data.shape)}, allowed: at least one element")
    if not isinstance(tensor, tuple):
        for plain in PLAIN.values():
            if plain.dtype == tensor.dtype and tensor.ndim <= MAX_DIMS:
                return tensor.shape, plain
        got = f"{tensor.dtype}{list(tensor.shape)}"
        raise FormatError(f"tensor {name!r}: got {got}, allowed: {', '.join(PLAIN)} of up to {MAX_DIMS} dimensions")
    type_name, rows = tensor
    block = BLOCKS.get(type_name)
    if block is None:
        raise FormatError(f"tensor {name!r}: got block type {type_name!r}, allowed: {', '.join(BLOCKS)}")
    if rows.dtype != np.uint8 or not 1 <= rows.ndim <= MAX_DIMS or rows.shape[-1] % block.bytes:
        got = f"{rows.dtype}{list(rows.shape)}"
        raise FormatError(f"tensor {name!r}: got {got}, allowed: uint8 rows of whole {block.bytes}-byte blocks")
    return (*rows.shape[:-1], rows.shape[-1] // block.bytes * block.elements), block


def _write_padded(file: BinaryIO, data: bytes, alignment: int) -> None:
    file.write(data)
    file.write(bytes(_aligned(len(data), alignment) - len(data)))

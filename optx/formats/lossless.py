"""bfloat16 numbers in fewer bits and exactly: exponents in short codes with lists of what the codes leave out."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np

from optx.errors import FormatError
from optx.formats.base import Format, Parts, pack_bits, require, unpack_bits

OFFSETS = (
    1,
    -3,
    -4,
    -5,
    -6,
    -7,
)  # exponents of the second code, from the row's base; its seventh is exponent 0, of zeros
FIRST, SECOND = 3, len(OFFSETS) + 1  # exponents of each code; the code that follows them sends on to the next
OVER, SWING = 1.2, 5.5  # bits a number in a row's lists, and what short rows have on top: SWING / sqrt(D)
BLOCK = 64  # numbers that a running count adds up by one product


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lossless(Format):
    """A bf16 number is a byte of sign and mantissa, and its exponent in 2 bits, else 3 more, else 8 more.

    A row (the last axis) has a base b: 2 bits say b, b - 1, b - 2 or "listed"; the numbers that are listed have, in order, 3
    bits for b + 1, b - 3 .. b - 7, zero or "listed again"; those have their exponent as a byte. The place in a list is a
    running count of the row's codes, so a row is read in one step, with no scan of bits. Exponents of trained weights hold
    about 2.6 bits (DFloat11, arXiv:2504.11651, which codes them by Huffman's tree); a Gaussian row takes 2.8 here.

    The lists have `room` bytes a row, whatever the data, so that shapes are known before it is read: Gaussian rows fit at
    every scale, and rows of Student's t with 6 degrees of freedom. A row that does not fit is stored as NaN; see `needed`.
    data: D bytes, D / 4 of the first code, the lists (3-bit codes from the front, bytes from the back), the base.
    """

    spare: int = 0  # percent more room, of a byte a number; 150 is room for any row

    def __post_init__(self):
        if not 0 <= self.spare <= 150:
            raise FormatError(f"lossless format: spare {self.spare}; allowed: 0 to 150 percent")

    def __str__(self):
        return "lossless" + (f"_s{self.spare}" if self.spare else "")

    def check(self, length):
        return f"{self}: axis of {length} is not a multiple of 4" if length % 4 else None

    def room(self, length: int) -> int:
        """Bytes of a row's lists: whole groups of eight 3-bit codes."""
        share = (OVER + SWING / math.sqrt(length)) / 8 + self.spare / 100
        return 3 * math.ceil(share * length / 3)

    def packed(self, length):
        return length + length // 4 + self.room(length) + 1

    def grouped(self, length):
        return None

    def encode(self, x: jax.Array) -> Parts:
        """float[..., D] -> Parts. Numbers that are not bf16 are rounded to it."""
        length = x.shape[-1]
        require(self.check(length))
        raw, exponent = split(x)
        base, room = base_of(exponent), self.room(length)
        first, second = codes(exponent, base)
        listed = first == FIRST
        again = listed & (second == SECOND)
        front = pack_threes(gathered(second, listed, room // 3 * 8))
        pool = front | gathered(exponent, again, room)[..., ::-1]  # disjoint where they fit
        parts = [raw, pack_bits(first, 2), pool, base]
        nan = [jnp.full_like(raw, 0x7F), jnp.zeros_like(parts[1]), pool, jnp.full_like(base, 0xFF)]
        fits = self.needed(x) <= room
        return Parts(data=jnp.concatenate([jnp.where(fits, a, b) for a, b in zip(parts, nan, strict=True)], axis=-1))

    def decode(self, parts, length, dtype):
        raw, first, pool, base = jnp.split(parts.data, np.cumsum([length, length // 4, self.room(length)]), axis=-1)
        first, second = unpack_bits(first, 2), unpack_threes(pool)
        exponents = jnp.where(second == SECOND, at_rank(pool[..., ::-1], second == SECOND), _second(base, second))
        listed = first == FIRST
        exponent = jnp.where(listed, at_rank(exponents, listed), base - first)
        bits = (raw & 0x80).astype(jnp.uint16) << 8 | exponent.astype(jnp.uint16) << 7 | (raw & 0x7F)
        return jax.lax.bitcast_convert_type(bits, jnp.bfloat16).astype(dtype)

    def needed(self, x: jax.Array) -> jax.Array:
        """float[..., D] -> int32[..., 1], bytes of lists that each row needs."""
        exponent = split(x)[1]
        first, second = codes(exponent, base_of(exponent))
        listed, again = (count(mask) for mask in (first == FIRST, (first == FIRST) & (second == SECOND)))
        return (listed + 7) // 8 * 3 + again


def parse_lossless(text: str) -> Lossless | None:
    match = re.fullmatch(r"lossless(?:_s(\d+))?", text)
    return match and Lossless(spare=int(match[1] or 0))


def split(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float[..., D] as bf16 -> (sign and mantissa, exponent), uint8."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
    return ((bits >> 8 & 0x80) | (bits & 0x7F)).astype(jnp.uint8), (bits >> 7 & 0xFF).astype(jnp.uint8)


def base_of(exponent: jax.Array) -> jax.Array:
    """uint8[..., D] -> uint8[..., 1], the base of each row under which its codes are shortest."""
    rows = exponent.reshape(-1, exponent.shape[-1])
    found = jnp.zeros((rows.shape[0], 256), jnp.int32).at[jnp.arange(rows.shape[0])[:, None], rows].add(1)
    short = sum(jnp.roll(found, i, axis=-1) for i in range(FIRST))
    middle = sum(jnp.roll(found, -i, axis=-1) for i in OFFSETS)
    apart = (np.arange(256) > -min(OFFSETS)) & (np.arange(256) < 256 - max(OFFSETS))  # no other code is that of zeros
    middle += jnp.where(apart, found[:, :1], 0)
    return jnp.argmax(11 * short + 8 * middle, axis=-1).astype(jnp.uint8).reshape(*exponent.shape[:-1], 1)


def codes(exponent: jax.Array, base: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both codes of every number, uint8[..., D]; arithmetic of bytes wraps around in both directions alike."""
    below = base - exponent
    first = jnp.minimum(below, FIRST).astype(jnp.uint8)
    second = jnp.full_like(exponent, SECOND)
    for code in reversed(range(SECOND)):
        second = jnp.where(exponent == _second(base, jnp.full_like(exponent, code)), jnp.uint8(code), second)
    return first, second


def _second(base, code):
    """Exponent of a second code: b + 1, b - 3 .. b - 7, and 0."""
    near = jnp.where(code == 0, base + jnp.uint8(1), base - jnp.uint8(2) - code)
    return jnp.where(code == len(OFFSETS), jnp.uint8(0), near)


def count(mask: jax.Array) -> jax.Array:
    return jnp.sum(mask, axis=-1, keepdims=True, dtype=jnp.int32)


def running(counts: jax.Array) -> jax.Array:
    """[..., D] -> int32[..., D], sums up to and with each entry, below 2^24: products with a triangle, block by block.

    On CPU jnp.cumsum takes 3x as long, and associative_scan 6x as long to compile.
    """
    n = counts.shape[-1]
    if n <= BLOCK:
        triangle = jnp.asarray(np.triu(np.ones((n, n), np.float32)))
        return jnp.matmul(counts.astype(jnp.float32), triangle, precision="highest").astype(jnp.int32)
    blocks = jnp.pad(counts, [(0, 0)] * (counts.ndim - 1) + [(0, -n % BLOCK)])
    blocks = running(blocks.reshape(*counts.shape[:-1], -1, BLOCK))
    before = running(blocks[..., -1]) - blocks[..., -1]
    return (blocks + before[..., None]).reshape(*counts.shape[:-1], -1)[..., :n]


def at_rank(listed: jax.Array, mask: jax.Array) -> jax.Array:
    """listed [..., C] -> [..., D]: where mask is set, the next entry; elsewhere any."""
    at = jnp.clip(running(mask) - 1, 0, listed.shape[-1] - 1)
    return jnp.take_along_axis(listed, at, axis=-1, mode="promise_in_bounds")


def gathered(values: jax.Array, mask: jax.Array, room: int) -> jax.Array:
    """Inverse of `at_rank`: values [..., D] where mask is set, in order, then zeros [..., room]; more is dropped."""
    at = jnp.where(mask, running(mask) - 1, room).reshape(-1, mask.shape[-1])
    rows = jnp.zeros((at.shape[0], room), values.dtype)
    rows = rows.at[jnp.arange(at.shape[0])[:, None], at].set(values.reshape(at.shape), mode="drop")
    return rows.reshape(*mask.shape[:-1], room)


def pack_threes(codes: jax.Array) -> jax.Array:
    """uint8 codes of 3 bits [..., 8 N] -> bytes [..., 3 N], lowest bits first."""
    word = codes.astype(jnp.uint32).reshape(*codes.shape[:-1], -1, 8) << jnp.arange(0, 24, 3, dtype=jnp.uint32)
    word = jnp.sum(word, axis=-1, keepdims=True, dtype=jnp.uint32)
    return (word >> jnp.arange(0, 24, 8, dtype=jnp.uint32)).astype(jnp.uint8).reshape(*codes.shape[:-1], -1)


def unpack_threes(data: jax.Array) -> jax.Array:
    """Inverse of `pack_threes`."""
    word = data.astype(jnp.uint32).reshape(*data.shape[:-1], -1, 3) << jnp.arange(0, 24, 8, dtype=jnp.uint32)
    word = jnp.sum(word, axis=-1, keepdims=True, dtype=jnp.uint32)
    return (word >> jnp.arange(0, 24, 3, dtype=jnp.uint32) & 7).astype(jnp.uint8).reshape(*data.shape[:-1], -1)

"""Two bits a number: rows turned by a random rotation, then walked along a trellis whose values are computed."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp

from optx.errors import FormatError
from optx.formats.base import Format, Parts, narrow, pack_bits, require, scale_of, unpack_bits
from optx.hadamard import Rotation

STEP = 2  # bits a number
MULTIPLIER, ADDEND = 34038481, 76625530  # of the generator "1MAD"
MEAN, DEVIATION = 510.0, 147.800537109375  # of the sum of its four bytes
SPREAD = 1.0  # deviation of a row in units of the code while it is walked; the scale is then fitted once more
BLOCK = 32  # numbers that are decided at once
AHEAD = 32  # numbers behind them that a decision looks at
AT_ONCE = 8  # rows that are walked side by side: their costs stay in a core's cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trellis(Format):
    """y = x Q, Q a random Hadamard rotation of the row (hadamard.py); y_i = scale v(s_i), s_i the last L bits of a stream
    that moves on by 2 bits a number.

    v is computed, not looked up: the sum of the four bytes of 34038481 s + 76625530 mod 2^32, centred and scaled to a
    standard normal ("1MAD" of QTIP, Tseng et al. 2024, arXiv:2406.11235). Rotated rows are close to normal, and a scale a row
    does for rows of different size what a rotation of the outputs would do; so each row is stored by itself. The stream begins
    in state 0 where QTIP's bites its tail: both spend exactly 2 bits a number. data: codes four a byte, the first lowest.
    """

    memory: int = 16  # L, bits of the state; 8 to 16; each bit more doubles the time of encoding, not that of decoding

    def __post_init__(self):
        if self.memory % STEP or not 8 <= self.memory <= 16:
            raise FormatError(f"trellis format: memory {self.memory}; allowed: even numbers of bits from 8 to 16")

    def __str__(self):
        return f"trellis2_l{self.memory}"

    def check(self, length):
        return f"{self}: axis of {length} is not a multiple of 4" if length % 4 else None

    def packed(self, length):
        return length * STEP // 8

    def grouped(self, length):
        return 1

    def rotation(self, length: int) -> Rotation:
        """Q. Its seed is fixed: nothing of it is stored."""
        return Rotation(d=length, seed=0, mixed=True)

    def encode(self, x: jax.Array) -> Parts:
        """float[..., D] -> Parts of least error in each row, input channels all alike."""
        require(self.check(x.shape[-1]))
        rows = self.rotation(x.shape[-1])(x.astype(jnp.float32).reshape(-1, x.shape[-1]))
        scale = self.scale(rows)
        codes, values = walk(rows / scale, None, self.memory)
        scale = self.refit(rows, values, values, scale)
        parts = Parts(data=pack_bits(codes, STEP), scale=scale)
        return jax.tree.map(lambda part: part.reshape(*x.shape[:-1], -1), parts)

    def scale(self, rows: jax.Array) -> jax.Array:
        """Rotated float32[..., D] -> float32[..., 1], what they are divided by."""
        return scale_of(jnp.sqrt(jnp.mean(rows * rows, axis=-1, keepdims=True)) / SPREAD, 1, jnp.float32)

    def refit(self, rows: jax.Array, values: jax.Array, weighted: jax.Array, scale: jax.Array) -> jax.Array:
        """float16[..., 1], the scale of least error of rows ~ scale * values; weighted: values times the errors' weights."""
        best = jnp.sum(rows * weighted, axis=-1, keepdims=True) / jnp.sum(values * weighted, axis=-1, keepdims=True)
        fitted = scale_of(jnp.where(best > 0, best, scale), 1, jnp.float16)
        return narrow(jnp.where(jnp.any(rows != 0, axis=-1, keepdims=True), fitted, 0), jnp.float16)

    def decode(self, parts, length, dtype):
        values = code_values(states(unpack_bits(parts.data, STEP), self.memory))
        return self.rotation(length).back(values * parts.scale.astype(jnp.float32)).astype(dtype)


def parse_trellis(text: str) -> Trellis | None:
    match = re.fullmatch(r"trellis2_l(\d+)", text)
    return match and Trellis(memory=int(match[1]))


def code_values(state: jax.Array) -> jax.Array:
    """uint32 states -> float32 values, of mean 0 and variance 1 over all 2^16."""
    word = state * jnp.uint32(MULTIPLIER) + jnp.uint32(ADDEND)
    total = sum((word >> shift) & 0xFF for shift in (0, 8, 16, 24))
    return (total.astype(jnp.float32) - MEAN) / DEVIATION


def states(codes: jax.Array, memory: int) -> jax.Array:
    """uint8 codes of 2 bits [..., D] -> uint32 [..., D], the last `memory` bits at every place."""
    length, back = codes.shape[-1], memory // STEP - 1
    wide = jnp.pad(codes.astype(jnp.uint32), [(0, 0)] * (codes.ndim - 1) + [(back, 0)])
    return sum(jax.lax.slice_in_dim(wide, back - i, back - i + length, axis=-1) << (STEP * i) for i in range(back + 1))


@functools.partial(jax.jit, static_argnames=("memory",))
def walk(rows: jax.Array, upper: jax.Array | None, memory: int) -> tuple[jax.Array, jax.Array]:
    """float32[F, D] in units of the code -> (codes uint8[F, D], values float32[F, D]).

    upper: triangular U [D, D] with U^T U the inverse of the inputs' Gram matrix; None: the identity. BLOCK numbers at a time
    are decided by Viterbi's algorithm with AHEAD more in view, then their errors e are made good by the numbers that follow:
    w -= e U_bb^-1 U_b (LDLQ of QuIP, arXiv:2307.13304, on one stream a row where QTIP has one for a tile of 16 rows).
    """
    d = rows.shape[-1]
    pad = -d % BLOCK
    feedback, weight = None, jnp.pad(jnp.ones(d, jnp.float32), (0, pad + AHEAD))
    if upper is not None:
        weight = weight.at[:d].set(1 / jnp.square(jnp.diagonal(upper)))
        weight = weight / jnp.max(weight)
        upper = jnp.pad(upper, ((0, pad), (0, pad))) + jnp.diag((jnp.arange(d + pad) >= d).astype(jnp.float32))
        feedback = jnp.pad(_feedback(upper), ((0, 0), (0, 0), (0, AHEAD)))
    one = functools.partial(_walk_row, weight=weight, feedback=feedback, memory=memory)
    codes, values = jax.lax.map(one, jnp.pad(rows, ((0, 0), (0, pad + AHEAD))), batch_size=AT_ONCE)
    return codes[:, :d], values[:, :d]


def _feedback(upper: jax.Array) -> jax.Array:
    """[D, D] -> [D / BLOCK, BLOCK, D]: U_bb^-1 U_b, zero up to and with the block's own columns."""
    d = upper.shape[0]
    blocks = upper.reshape(d // BLOCK, BLOCK, d)
    at = jnp.arange(d // BLOCK)
    own = blocks.reshape(d // BLOCK, BLOCK, d // BLOCK, BLOCK)[at, :, at]
    later = jnp.arange(d) >= (at[:, None, None] + 1) * BLOCK
    return jax.vmap(lambda a, b: jax.scipy.linalg.solve_triangular(a, b, lower=False))(own, jnp.where(later, blocks, 0))


def _walk_row(row, weight, feedback, memory):
    """row [D + AHEAD], D a multiple of BLOCK -> (codes [D], values [D])."""
    count = (row.shape[0] - AHEAD) // BLOCK

    def decide(carry, b):
        row, state = carry
        target, w = (jax.lax.dynamic_slice_in_dim(x, b * BLOCK, BLOCK + AHEAD) for x in (row, weight))
        path = _viterbi(target, w, state, memory)[:BLOCK]
        values = code_values(path)
        if feedback is not None:
            row = row - jnp.matmul(target[:BLOCK] - values, feedback[b], precision="highest")
        return (row, path[-1]), ((path & 3).astype(jnp.uint8), values)

    (_, _), found = jax.lax.scan(decide, (row, jnp.uint32(0)), jnp.arange(count))
    return jax.tree.map(lambda x: x.reshape(-1), found)


def _viterbi(target, weight, start, memory):
    """target, weight [T]; start uint32, the state before -> uint32[T], the states of least weighted squared error.

    State s comes from s >> 2 with any two bits on top: four costs a state, whose least all four followers share.
    """
    top = memory - STEP
    values = code_values(jnp.arange(2**memory, dtype=jnp.uint32)).reshape(-1, 4)

    def forward(cost, x):
        a, b, c, d = cost.reshape(4, -1)
        low, high = jnp.minimum(a, b), jnp.minimum(c, d)
        came = jnp.where(high < low, jnp.where(d < c, 3, 2), jnp.where(b < a, 1, 0)).astype(jnp.uint8)
        step = x[1] * jnp.square(x[0] - values)
        return (jnp.minimum(low, high)[:, None] + step).reshape(-1), came

    def backward(state, came):
        before = state >> STEP
        return before | (came[before].astype(jnp.uint32) << top), state

    cost = jnp.where(jnp.arange(2**memory) == start, 0.0, jnp.inf)
    cost, came = jax.lax.scan(forward, cost, (target, weight))
    return jax.lax.scan(backward, jnp.argmin(cost).astype(jnp.uint32), came, reverse=True)[1]

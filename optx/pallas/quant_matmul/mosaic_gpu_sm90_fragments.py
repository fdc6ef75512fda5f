"""The arrangement of packed weights that the Hopper kernel reads, and back.

`wgmma` takes its first operand from registers in fixed fragments: of a block of 64 outputs by 16 contracted numbers,
thread 32 w + 4 g + c holds outputs 16 w + g + 8 h and numbers 8 j + 2 c + e, for h, j, e in {0, 1}. Here the codes lie
so that a thread finds its own in 16 contiguous bytes, pairs (e = 0, 1) in the two halves of a 32-bit word, ready to be
widened to bfloat16 by bit operations. Derived once, when a model is lowered; never exported.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from optx.formats import Float4, Float8, Format, Int
from optx.tensor import Arranged, QTensor, leaf_bytes

BLOCK = 64  # outputs, and contracted numbers, of one block of fragments
WORDS = 256  # 32-bit words in one row of `data`: no side of a TMA box may be longer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Fragments(Arranged):
    """A packed weight [D, F] in the order of `wgmma` fragments. Made by `relayout`.

    data int32[F / 64, D / 64 * bits / 2, 256]: 64 x 64 blocks, the D of one block of outputs side by side;
    scale [F / 64, groups, 64], zero bfloat16[F / 64, groups, 64] or None: outputs 16 w + 8 h + g at 16 w + 2 g + h.
    outer float32[F / 64, 1, 64]: the scale of a whole output beside those of its blocks (nvfp4), or None.
    """

    data: jax.Array
    scale: jax.Array
    zero: jax.Array | None = None
    outer: jax.Array | None = None
    format: Format = dataclasses.field(metadata={"static": True})
    length: int = dataclasses.field(metadata={"static": True})  # D
    dtype: jnp.dtype = dataclasses.field(default=jnp.dtype("bfloat16"), metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        return self.length, self.data.shape[0] * BLOCK

    @property
    def ndim(self) -> int:
        return 2

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return sum(leaf_bytes(part) for part in self.parts)

    @property
    def parts(self) -> tuple[jax.Array, ...]:
        return tuple(part for part in (self.data, self.scale, self.zero, self.outer) if part is not None)

    @property
    def bits(self) -> int:
        return bits(self.format)

    @property
    def groups(self) -> int:
        return self.scale.shape[1]

    def qtensor(self) -> QTensor:
        """The weight in its canonical packing: the inverse of `relayout`."""
        data = _restore(self.data, self.bits, self.length)
        data = jax.lax.bitcast_convert_type(data, jnp.float8_e4m3fn) if isinstance(self.format, Float8) else data
        zero = self.zero
        if isinstance(self.format, Int) and self.bits == 8:
            data = data.astype(jnp.int8) if self.format.symmetric else data ^ jnp.uint8(128)
        if zero is not None:
            zero = (_restore_rows(zero).astype(jnp.float32) + _offset(self.bits)).astype(jnp.uint8)
        scale = _restore_rows(self.scale)
        if self.outer is not None:
            outer = jax.lax.bitcast_convert_type(_restore_rows(self.outer)[:, 0], jnp.uint8)
            scale = jnp.concatenate([scale, outer], axis=-1)
        return QTensor(
            data=data,
            scale=scale,
            zero=zero,
            format=self.format,
            length=self.length,
            dtype=self.dtype,
        )

    def dequantize(self) -> jax.Array:
        """dtype[D, F]."""
        return self.qtensor().dequantize()


@jax.jit
def relayout(w: QTensor) -> Fragments:
    """The same weight as `Fragments`. w: what `supports` of the kernel takes ([D, F] in 64s, 4 or 8 bits)."""
    width = bits(w.format)
    data, scale, zero, outer = w.data, w.scale, w.zero, None
    if isinstance(w.format, Float8):  # the kernel reads the codes of NaN as numbers: a scale tells of them
        bad = jnp.any(jnp.isnan(data.reshape(*scale.shape, -1)), axis=-1)
        scale = jnp.where(bad, jnp.nan, scale)
    if isinstance(w.format, Float8) or data.dtype == jnp.int8:
        data = jax.lax.bitcast_convert_type(data, jnp.uint8)
    elif width == 8:
        data = data ^ jnp.uint8(128)  # the kernel reads bytes as signed
    if zero is not None:
        zero = _arrange_rows((zero.astype(jnp.float32) - _offset(width)).astype(jnp.bfloat16))
    if isinstance(w.format, Float4) and w.format.kind == "nv":
        blocks = w.length // w.format.group
        outer = jax.lax.bitcast_convert_type(scale[:, blocks:], jnp.float32)[:, None]
        scale = scale[:, :blocks]
        outer = _arrange_rows(jnp.where(jnp.any((scale & 127) == 127, axis=1, keepdims=True), jnp.nan, outer))
    return Fragments(
        data=_arrange(data, width, w.length),
        scale=_arrange_rows(scale),
        zero=zero,
        outer=outer,
        format=w.format,
        length=w.length,
        dtype=w.dtype,
    )


def bits(format_: Format) -> int:
    """Bits of a code of a format that the kernel takes."""
    return {Int: getattr(format_, "width", None), Float8: 8, Float4: 4}[type(format_)]


def _offset(width: int) -> int:
    """What the kernel takes from a code before the zero point is subtracted: a widened int4 is 128 + code."""
    return -128 if width == 4 else 128


# Axes of the arrangements below: T, K blocks of outputs and of contracted numbers; w h g the output 16 w + 8 h + g in
# its block; s j c e the number 16 s + 8 j + 2 c + e in its block (s = 2 u + v).
_SHAPE = (4, 2, 8)  # w h g


def _arrange(data, width, length):
    """uint8[F, packed] -> int32[F / 64, D / 64 * bits / 2, 256]."""
    outputs, inputs = data.shape[0] // BLOCK, length // BLOCK
    if width == 4:
        nibbles = jnp.stack([data & 15, data >> 4], axis=-1).reshape(outputs, *_SHAPE, inputs, 4, 2, 4, 2)
        low, high = nibbles[:, :, 0], nibbles[:, :, 1]  # T w g K s j c e
        data = jnp.transpose(low | (high << 4), (0, 3, 1, 2, 6, 4, 7, 5))  # T K w g c s [e j]: byte j + 2 e of word s
    else:
        data = data.reshape(outputs, *_SHAPE, inputs, 2, 2, 2, 4, 2)  # T w h g K u v j c e
        data = jnp.transpose(data, (0, 4, 5, 1, 3, 8, 6, 7, 9, 2))  # T K u w g c [v j] [e h]
    words = jax.lax.bitcast_convert_type(data.reshape(outputs, -1, 4), jnp.int32)
    return words.reshape(outputs, -1, WORDS)


def _restore(words, width, length):
    """int32[F / 64, D / 64 * bits / 2, 256] -> uint8[F, packed]."""
    outputs, inputs = words.shape[0], length // BLOCK
    data = jax.lax.bitcast_convert_type(words, jnp.uint8)
    if width == 4:
        data = data.reshape(outputs, inputs, 4, 8, 4, 4, 2, 2)  # T K w g c s e j
        data = jnp.transpose(data, (0, 2, 3, 1, 5, 7, 4, 6))  # T w g K s j c e
        nibbles = jnp.stack([data & 15, data >> 4], axis=2).reshape(outputs * BLOCK, length)
        return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)
    data = data.reshape(outputs, inputs, 2, 4, 8, 4, 2, 2, 2, 2)  # T K u w g c v j e h
    return jnp.transpose(data, (0, 3, 9, 4, 1, 2, 6, 7, 5, 8)).reshape(outputs * BLOCK, length)


def _arrange_rows(x):
    """[F, groups] -> [F / 64, groups, 64], the two outputs of a thread side by side."""
    return jnp.transpose(x.reshape(-1, *_SHAPE, x.shape[1]), (0, 4, 1, 3, 2)).reshape(-1, x.shape[1], BLOCK)


def _restore_rows(x):
    return jnp.transpose(x.reshape(x.shape[0], x.shape[1], 4, 8, 2), (0, 2, 4, 3, 1)).reshape(-1, x.shape[1])

"""`QTensor`: a weight whose storage format is its type; and the contraction family that takes dense and packed alike.

Axis letters used everywhere: B sequences, T ragged tokens, S kv length, N query heads, K kv heads, H head dim, D model
dim, F ffn dim, V vocab, E experts, P page size, R latent rank, L layers.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from optx.errors import FormatError
from optx.formats import Format, Parts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class QTensor:
    """A quantized array of logical shape `shape`, packed along `axis` (the axis that contractions sum over).

    `data`, `scale`, `zero` keep `axis` last and all other axes in order, so a weight [D, F] packed along D lies as
    [F, D_packed] and `.T` only renames axes. `axis` is -1 (a table [V, D]) or -2 (a matrix [..., D, F]).
    Invariants (checked by `validate`): data.shape[-1] == format.packed(length), scale.shape[-1] == format.grouped(length).
    """

    data: jax.Array
    scale: jax.Array | None = None
    zero: jax.Array | None = None
    format: Format = dataclasses.field(metadata={"static": True})
    length: int = dataclasses.field(metadata={"static": True})
    axis: int = dataclasses.field(default=-2, metadata={"static": True})
    dtype: jnp.dtype = dataclasses.field(default=jnp.dtype("float32"), metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        lead = self.data.shape[:-1]
        return (*lead, self.length) if self.axis == -1 else (*lead[:-1], self.length, lead[-1])

    @property
    def ndim(self) -> int:
        return self.data.ndim

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return sum(leaf_bytes(p) for p in (self.data, self.scale, self.zero) if p is not None)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits a number, scales and zero points included."""
        return 8 * self.nbytes / self.size

    @property
    def T(self) -> "QTensor":
        return dataclasses.replace(self, axis=-1 if self.axis == -2 else -2)

    def rows(self) -> jax.Array:
        """Dequantized in storage order, the packed axis last: dtype[..., rows, length]."""
        parts = Parts(data=self.data, scale=self.scale, zero=self.zero)
        return self.format.decode(parts, self.length, self.dtype)

    def dequantize(self) -> jax.Array:
        """The array that the stored numbers stand for: dtype[shape]."""
        return self.rows() if self.axis == -1 else jnp.swapaxes(self.rows(), -1, -2)

    def validate(self, where: str = "QTensor") -> None:
        """Raises FormatError when the parts do not fit the format."""
        want = self.format.packed(self.length)
        if self.data.shape[-1] != want:
            raise FormatError(f"{where}: {self.format} of {self.length} needs data[..., {want}], got {self.data.shape}")
        groups, lead = self.format.grouped(self.length), list(self.data.shape[:-1])
        if self.format.block_rows > 1:
            lead[-1] = -(-lead[-1] // self.format.block_rows)
        for name, part in (("scale", self.scale), ("zero", self.zero)):
            if part is not None and part.shape != (*lead, groups):
                raise FormatError(f"{where}: {self.format} needs {name}{[*lead, groups]}, got {part.shape}")
        for name, part, wanted in (
            ("scale", self.scale, groups is not None),
            ("zero", self.zero, self.format.has_zero),
        ):
            if (part is not None) != wanted:
                raise FormatError(f"{where}: {self.format} {'needs a' if wanted else 'has no'} {name}")


class Arranged:
    """A packed weight [D, F] in the order that one kernel reads, made at lowering and never exported.

    Subclasses are registered pytrees; `format`, `dtype`, `shape`, `ndim`, `size` and `nbytes` are those of a QTensor.
    """

    def qtensor(self) -> QTensor:
        """The same weight in its canonical packing."""
        raise NotImplementedError


Tensor = jax.Array | QTensor | Arranged


def is_qtensor(x) -> bool:
    return isinstance(x, QTensor)


def is_packed(x) -> bool:
    """Whether x is stored in a format, in its canonical packing or in a kernel's order."""
    return isinstance(x, QTensor | Arranged)


def leaf_bytes(x) -> int:
    """Bytes of an array or of its abstract form."""
    return math.prod(x.shape) * jnp.dtype(x.dtype).itemsize


def nbytes(x: Tensor) -> int:
    """Stored bytes of a dense or quantized tensor, concrete or abstract."""
    return x.nbytes if is_packed(x) else leaf_bytes(x)


def lift(function, *args):
    """function(*args), or its abstract result when any leaf is a shape: how passes work on both forms of the tree."""
    abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(args))
    return jax.eval_shape(function, *args) if abstract else function(*args)


def quantize(x: jax.Array, format: Format, axis: int = -2) -> QTensor:
    """Round to nearest: float[..., D, F] -> QTensor of the same logical shape, packed along `axis`; x may be abstract.

    Raises: FormatError when the axis does not divide, or the format cannot be written.
    """
    if axis not in (-1, -2):
        raise FormatError(f"quantize: axis {axis}; allowed: -1 (rows of a table), -2 (the contracted axis of a matrix)")
    return _quantized_shape(x, format, axis) if isinstance(x, jax.ShapeDtypeStruct) else _quantize(x, format, axis)


@functools.lru_cache(maxsize=1024)
def _quantized_shape(x, format, axis):
    """A plan asks the same of the weights of every layer. Rows are packed each by itself, so one stands for all."""
    if format.block_rows > 1:
        return jax.eval_shape(lambda x: _quantize(x, format, axis), x)
    rows = x.shape[:-1] if axis == -1 else (*x.shape[:-2], x.shape[-1])
    row = _quantized_row(jax.ShapeDtypeStruct((1, x.shape[axis]), x.dtype), format)
    parts = jax.tree.map(lambda part: jax.ShapeDtypeStruct((*rows, *part.shape[1:]), part.dtype), row)
    return dataclasses.replace(parts, axis=axis)


@functools.lru_cache(maxsize=1024)
def _quantized_row(x, format):
    return jax.eval_shape(lambda x: _quantize(x, format, -1), x)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _quantize(x, format, axis):
    parts = format.encode(x if axis == -1 else jnp.swapaxes(x, -1, -2))
    return QTensor(
        data=parts.data,
        scale=parts.scale,
        zero=parts.zero,
        format=format,
        length=x.shape[axis],
        axis=axis,
        dtype=x.dtype,
    )


def canonical(w: Tensor) -> Tensor:
    """w without the order of a kernel: dense, or a QTensor."""
    return lift(lambda w: w.qtensor(), w) if isinstance(w, Arranged) else w


def dense(w: Tensor) -> jax.Array:
    w = canonical(w)
    return w.dequantize() if is_qtensor(w) else w


def matmul(x: jax.Array, w: Tensor) -> jax.Array:
    """x[..., D] @ w[..., D, F] -> [..., F] in x's dtype, accumulated in float32; packed weights are dequantized inside.

    Raises: FormatError for a weight packed along its output axis.
    """
    if not is_qtensor(w):
        return jnp.matmul(x, w, preferred_element_type=jnp.float32).astype(x.dtype)
    if w.axis != -2:
        raise FormatError(f"matmul: weight {w.shape} is packed along its last axis; contract over it with w.T")
    return matmul_rows(x, w.rows())


def matmul_rows(x: jax.Array, rows: jax.Array) -> jax.Array:
    """x[..., D] against rows[..., F, D] (a table, or a weight in storage order) -> [..., F] in x's dtype."""
    rows = rows.astype(x.dtype)
    few = x.size <= 8 * x.shape[-1] and rows.ndim == 2
    if few:  # XLA on CPU reads [F, D] row by row this way round; the other is 4x slower for a single row of x
        y = jnp.matmul(rows, x.reshape(-1, x.shape[-1]).T, preferred_element_type=jnp.float32).T
        y = y.reshape(*x.shape[:-1], rows.shape[0])
    else:
        y = jnp.matmul(x, jnp.swapaxes(rows, -1, -2), preferred_element_type=jnp.float32)
    return y.astype(x.dtype)


def einsum(spec: str, x: jax.Array, w: Tensor) -> jax.Array:
    """`jnp.einsum` of a dense and a dense or packed operand, accumulated in float32, in x's dtype."""
    return jnp.einsum(spec, x, dense(w).astype(x.dtype), preferred_element_type=jnp.float32).astype(x.dtype)


def take(w: Tensor, ids: jax.Array) -> jax.Array:
    """Rows `ids` int[...] of a table [V, D] -> [..., D]; of a packed table only these rows are dequantized."""
    if not is_qtensor(w):
        return jnp.take(w, ids, axis=0, mode="clip")
    if w.axis != -1:
        raise FormatError(f"take: table {w.shape} is packed along its first axis; pack a table along its last axis")
    each = w.format.block_rows
    data = jnp.take(w.data, ids, axis=0, mode="clip")
    scale, zero = jax.tree.map(lambda part: jnp.take(part, ids // each, axis=0, mode="clip"), (w.scale, w.zero))
    parts = jax.tree.map(lambda part: part[..., None, :], Parts(data=data, scale=scale, zero=zero))
    return w.format.decode(parts, w.length, w.dtype)[..., 0, :]


def columns(w: Tensor, start: int, size: int) -> Tensor:
    """w[D, F] -> the same of its outputs start .. start + size, in its form. Raises FormatError inside a block of outputs."""
    if not is_qtensor(w):
        return jax.lax.slice_in_dim(w, start, start + size, axis=1)
    each, end = w.format.block_rows, start + size
    if start % each or (end % each and end != w.data.shape[0]):
        raise FormatError(f"{w.format} of {w.shape}: outputs {start} to {end} share scales with others, {each} a block")
    data = jax.lax.slice_in_dim(w.data, start, end)
    cut = functools.partial(jax.lax.slice_in_dim, start_index=start // each, limit_index=-(-end // each))
    return dataclasses.replace(w, data=data, scale=jax.tree.map(cut, w.scale), zero=jax.tree.map(cut, w.zero))

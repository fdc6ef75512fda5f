"""Parts whose numbers run rotated: a block at an end of a rotated stream, norms, projections and heads."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from optx.cache import Ragged, View
from optx.hadamard import Rotation
from optx.nn.core import Linear, Rope, param
from optx.nn.decoder import Block
from optx.nn.moe import GroupedLinear


class Orthogonal(nnx.Module):
    """x -> x Q for any orthogonal Q [D, D] kept as data; `back` undoes it."""

    def __init__(self, matrix: jax.Array):
        self.matrix = nnx.Param(matrix, axes=("embed", None))

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> x Q in x's dtype, computed in float32."""
        return jnp.matmul(x.astype(jnp.float32), self.matrix.get_value()).astype(x.dtype)

    def back(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> x Q^T in x's dtype, computed in float32."""
        return jnp.matmul(x.astype(jnp.float32), self.matrix.get_value().T).astype(x.dtype)


class RotatedBlock(Block):
    """A block where the stream begins to be rotated (`enters`: x Q goes in) or ceases to be (`leaves`: x Q^T comes out)."""

    def __init__(
        self, block: Block, *, enters: Rotation | Orthogonal | None = None, leaves: Rotation | Orthogonal | None = None
    ):
        super().__init__(
            norm=block.norm, mixer=block.mixer, mlp_norm=block.mlp_norm, mlp=block.mlp,
            post_norm=block.post_norm, post_mlp_norm=block.post_mlp_norm,
            residual=block.residual, mlp_residual=block.mlp_residual,
        )  # fmt: skip
        self.enters, self.leaves = enters, leaves
        self.choices = block.choices

    def unjoined(self, x: jax.Array, y: jax.Array | None, ragged: Ragged, cache: View | None):
        if self.enters is not None:
            x, y = self.enters(x if y is None else x + y), None
        x, y, pool = super().unjoined(x, y, ragged, cache)
        if self.leaves is not None:
            x, y = self.leaves.back(x if y is None else x + y), None
        return x, y, pool


class RotatedNorm(nnx.Module):
    """norm(x) Q, for parts whose weights took Q^T."""

    def __init__(self, norm: nnx.Module, rotation: Rotation):
        self.norm, self.rotation = norm, rotation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.rotation(self.norm(x))


class Rotated(nnx.Module):
    """linear(x Q): what the projection's weight lost to Q^T is given to its input."""

    def __init__(self, linear: Linear | GroupedLinear, rotation: Rotation):
        self.linear, self.rotation = linear, rotation

    @property
    def weight(self) -> nnx.Variable:
        return self.linear.weight

    @property
    def bias(self) -> nnx.Variable | None:
        return self.linear.bias

    def __call__(self, x: jax.Array, *args) -> jax.Array:
        return self.linear(self.rotation(x), *args)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotatedHeads:
    """In the place of a rotary embedding: rope(x), and then x Q of each head, so that q Q . k Q = q . k."""

    rope: Rope | None
    rotation: Rotation

    @property
    def keys(self) -> "RotatedHeads":
        return self

    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        return self.rotation(x if self.rope is None else self.rope(x, positions))

    def __str__(self):
        return f"{self.rope}, {self.rotation}"


class CalibratedHeads(nnx.Module):
    """As RotatedHeads, with matrices that come from data: rope(x), and then x R of each head, R orthogonal float32[H, H]; where
    `kv_heads` is given q B and k A with A B^T = 1, float32[K, H, H], of a kv head and the queries that read it."""

    def __init__(self, rope: Rope | None, head_dim: int, kv_heads: int | None = None):
        self.rope = rope
        shape, axes = ((), ()) if kv_heads is None else ((kv_heads,), ("kv_heads",))
        of = lambda: param((*shape, head_dim, head_dim), "float32", (*axes, None, None), None)  # noqa: E731
        self.matrix = of()
        self.key_matrix = None if kv_heads is None else of()

    @property
    def rotation(self) -> str:
        """What heads go through after their turns, for facts and for kernels that decline it."""
        kind = "rotation" if self.key_matrix is None else "transform of each head"
        return f"a calibrated {kind} of {self.matrix.get_value().shape[-1]}"

    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        return self._through(self.matrix, x, positions)

    @property
    def keys(self):
        return self if self.key_matrix is None else functools.partial(self._through, self.key_matrix)

    def _through(self, matrix: nnx.Param, x: jax.Array, positions: jax.Array) -> jax.Array:
        x = x if self.rope is None else self.rope(x, positions)
        by_head = x.astype(jnp.float32).reshape(*x.shape[:-2], *matrix.get_value().shape[:-2], -1, x.shape[-1])
        y = jnp.matmul(by_head, matrix.get_value(), precision="highest")
        return y.astype(x.dtype).reshape(x.shape)

    def __str__(self):
        return f"{self.rope}, {self.rotation}"

"""Codebooks of the normal distribution: each number of a rotated vector to its nearest centroid, its length apart."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np

from optx.errors import FormatError
from optx.formats.base import Format, Parts, narrow, pack_codes, require, unpack_codes

WIDTHS = (1, 2, 3, 4)
BYTES = {1: 8, 2: 4, 3: 8, 4: 2}  # numbers that fill whole bytes


@functools.cache
def centroids(width: int) -> np.ndarray:
    """float64[2^width], ascending: the code of least mean squared error for N(0, 1) (Max 1960; Lloyd 1982).

    Lloyd's iteration on the density itself: c_i = E[x | t_i < x < t_(i+1)] = (p(t_i) - p(t_(i+1))) / (P(t_(i+1)) - P(t_i)),
    t half way between neighbours.
    """
    code = np.linspace(-2, 2, 2**width)
    while True:
        edges = np.concatenate([[-math.inf], (code[1:] + code[:-1]) / 2, [math.inf]])
        density = np.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi)
        share = np.array([(1 + math.erf(t / math.sqrt(2))) / 2 for t in edges])
        new = -np.diff(density) / np.diff(share)
        if np.max(np.abs(new - code)) < 1e-13:
            return new
        code = new


@dataclasses.dataclass(frozen=True, kw_only=True)
class Codebook(Format):
    """x_j = s c(i_j) of a vector x of H numbers, c the 2^b `centroids`:

    i_j = argmin_i |sqrt(H) x_j / |x| - c(i)|,   s = |x| / |c(i_1), ..., c(i_H)|

    Meant for vectors that were rotated at random, whose unit vector has numbers close to N(0, 1 / H): TurboQuant (Zandieh et al.
    2025, arXiv:2504.19874), algorithm 1, whose mean squared error over |x|^2 is 0.3634, 0.1175, 0.0345, 0.0095 at 1 to 4 bits.
    Its s is |x| / sqrt(H); this one gives every vector its exact length, where centroids are shorter than what they stand for.
    """

    width: int  # b, bits a number
    scale_dtype: str = "float16"

    def __post_init__(self):
        if self.width not in WIDTHS:
            raise FormatError(f"codebook format: width {self.width}; allowed: 1 to 4")

    def __str__(self):
        return f"codebook{self.width}"

    def check(self, length):
        need = BYTES[self.width]
        return f"{self}: axis of {length} is not a multiple of {need}" if length % need else None

    def packed(self, length):
        return length * self.width // 8

    def grouped(self, length):
        return 1

    def encode(self, x):
        require(self.check(x.shape[-1]))
        x = x.astype(jnp.float32)
        codes = self.nearest(x)
        return self.assemble(codes, self.scale(x, codes), None)

    def nearest(self, x: jax.Array) -> jax.Array:
        """float32[..., H] -> float32 codes, decided on the unit vector."""
        length = jnp.linalg.norm(x, axis=-1, keepdims=True)
        return self.code(x, jnp.where(length > 0, length, 1) / math.sqrt(x.shape[-1]), 0)

    def scale(self, x: jax.Array, codes: jax.Array) -> jax.Array:
        """[..., 1]: 0 of a vector of zeros, NaN of one with a NaN or an infinity in it."""
        lengths = [jnp.linalg.norm(y, axis=-1, keepdims=True) for y in (x, self.value(codes, 1, 0))]
        scale = jnp.minimum(lengths[0] / lengths[1], float(jnp.finfo(self.scale_dtype).max))
        return narrow(jnp.where(jnp.isfinite(lengths[0]), scale, jnp.nan), self.scale_dtype)

    def grid(self, x, shrink=1.0):
        x = x.astype(jnp.float32)
        scale = self.scale(x, self.nearest(x)).astype(jnp.float32) * shrink
        return narrow(scale, self.scale_dtype), None

    def steps(self, scale, zero, length):
        step = jnp.broadcast_to(scale.astype(jnp.float32), (*scale.shape[:-1], length))
        return step, jnp.zeros_like(step)

    def code(self, x, step, offset):
        edges = centroids(self.width)
        edges = jnp.asarray((edges[1:] + edges[:-1]) / 2, jnp.float32)
        return jnp.sum((x / step)[..., None] > edges, axis=-1).astype(jnp.float32)

    def value(self, code, step, offset):
        return jnp.asarray(centroids(self.width), jnp.float32)[code.astype(jnp.int32)] * step

    def assemble(self, codes, scale, zero):
        return Parts(data=pack_codes(codes.astype(jnp.uint8), self.width), scale=scale)

    def decode(self, parts, length, dtype):
        return self.value(unpack_codes(parts.data, self.width), parts.scale.astype(jnp.float32), 0).astype(dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodebookQJL(Format):
    """A codebook of b - 1 bits, and the sign of each number of S r, r what it leaves over:

    x' = y + sqrt(pi / 2) |r| / H S^T sign(S r),   r = x - y, y the codebook's x, S of H x H numbers N(0, 1)

    E[q . x'] = q . x over S for every q: TurboQuant_prod (arXiv:2504.19874, algorithm 2; QJL, arXiv:2406.03482). It has no bias,
    and more variance than the b-th bit of a codebook leaves: |x' - x|^2 is pi / 2 of |r|^2, which that bit takes to a quarter.
    scale: [..., 2], the codebook's and sqrt(pi / 2) |r| / sqrt(H).
    """

    width: int  # b, bits a number in all

    def __post_init__(self):
        if self.width not in WIDTHS[1:]:
            raise FormatError(f"codebook format with QJL: width {self.width}; allowed: 2 to 4, one of them the sign")

    def __str__(self):
        return f"codebook{self.width}_qjl"

    @property
    def coarse(self) -> Codebook:
        return Codebook(width=self.width - 1)

    def check(self, length):
        return f"{self}: axis of {length} is not a multiple of 8" if length % 8 else None

    def packed(self, length):
        return length * self.width // 8

    def grouped(self, length):
        return 2

    def encode(self, x):
        require(self.check(x.shape[-1]))
        x, length = x.astype(jnp.float32), x.shape[-1]
        parts = self.coarse.encode(x)
        rest = x - self.coarse.decode(parts, length, jnp.float32)
        signs = jnp.matmul(rest, _sketch(length).T, precision="highest") > 0
        factor = jnp.linalg.norm(rest, axis=-1, keepdims=True) * math.sqrt(math.pi / 2 / length)
        data = jnp.concatenate([parts.data, pack_codes(signs.astype(jnp.uint8), 1)], axis=-1)
        return Parts(data=data, scale=jnp.concatenate([parts.scale, narrow(factor, parts.scale.dtype)], axis=-1))

    def decode(self, parts, length, dtype):
        cut = self.coarse.packed(length)
        own = Parts(data=parts.data[..., :cut], scale=parts.scale[..., :1])
        signs = 2 * unpack_codes(parts.data[..., cut:], 1).astype(jnp.float32) - 1
        rest = jnp.matmul(signs, _sketch(length), precision="highest") * parts.scale[..., 1:].astype(jnp.float32)
        return (self.coarse.decode(own, length, jnp.float32) + rest).astype(dtype)


@functools.cache
def _numbers(length: int) -> np.ndarray:
    return np.random.default_rng((0, length)).standard_normal((length, length)) / math.sqrt(length)


def _sketch(length: int) -> jax.Array:
    """S / sqrt(H). Its seed is fixed: nothing of it is stored."""
    return jnp.asarray(_numbers(length), jnp.float32)


def parse_codebook(text: str) -> Codebook | CodebookQJL | None:
    match = re.fullmatch(r"codebook(\d)(_qjl)?", text)
    return match and (CodebookQJL if match[2] else Codebook)(width=int(match[1]))

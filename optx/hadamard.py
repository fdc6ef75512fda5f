"""Hadamard rotations of any width: orthogonal, spread an outlier over many numbers, and cost O(D log D) of a token.

Q = diag(s) (M kron H_n / sqrt(n)) with n the largest power of two that divides D, random signs s, and M orthogonal of the
D / n numbers left over: the identity (Q is then block-diagonal) or a random rotation. SmolLM2's 576 = 9 x 64.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

FACTOR = 128  # widest matrix that a transform multiplies by: a tile of a matrix unit


def matrix(n: int) -> np.ndarray:
    """float64[n, n]: Sylvester's Hadamard matrix over sqrt(n), symmetric and orthogonal; n a power of two."""
    from scipy.linalg import hadamard  # slow to load

    return hadamard(n).astype(np.float64) / math.sqrt(n)


def block(d: int) -> int:
    """The largest power of two that divides d."""
    return d & -d


@functools.cache
def _factors(n: int) -> tuple[np.ndarray, ...]:
    """Matrices whose Kronecker product is `matrix(n)`, none wider than FACTOR, of nearly equal width."""
    bits = n.bit_length() - 1
    count = max(1, -(-bits // (FACTOR.bit_length() - 1)))
    return tuple(matrix(1 << (bits // count + (i < bits % count))) for i in range(count))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotation:
    """x -> x Q of the last axis, of d numbers; `back` undoes it. Q depends on these fields alone."""

    d: int
    size: int | None = None  # n, a power of two that divides d; None: the largest one
    seed: int | None = None  # of the signs and of M; None: no signs
    mixed: bool = False  # M is a random rotation, not the identity; needs a seed

    def __post_init__(self):
        n = self.n
        assert n & (n - 1) == 0 and self.d % n == 0, f"{n} is no power of two that divides {self.d}"
        assert not self.mixed or self.seed is not None, "a random rotation needs a seed"

    @property
    def n(self) -> int:
        return block(self.d) if self.size is None else self.size

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> x Q in x's dtype, computed in float32."""
        signs, mats = _parts(self)
        y = x.astype(jnp.float32)
        y = y if signs is None else y * signs.astype(np.float32)
        return _kron(y, mats, _contract).astype(x.dtype)

    def back(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> x Q^T in x's dtype, computed in float32."""
        signs, mats = _parts(self)
        y = _kron(x.astype(jnp.float32), [m if m is None else m.T for m in mats], _contract)
        return (y if signs is None else y * signs.astype(np.float32)).astype(x.dtype)

    def fold(self, w: np.ndarray, axis: int) -> np.ndarray:
        """float64: w with Q applied along an axis of D numbers: w Q for the last one, Q^T w for the one before."""
        signs, mats = _parts(self)
        y = np.moveaxis(np.asarray(w, np.float64), axis, -1)
        y = _kron(y if signs is None else y * signs, mats, _contract_float64)
        return np.moveaxis(y, -1, axis)

    def unfold(self, w: np.ndarray, axis: int) -> np.ndarray:
        """What `fold` undoes, float64."""
        signs, mats = _parts(self)
        y = _kron(
            np.moveaxis(np.asarray(w, np.float64), axis, -1), [m if m is None else m.T for m in mats], _contract_float64
        )
        return np.moveaxis(y if signs is None else y * signs, -1, axis)

    def __str__(self):
        rest = self.d // self.n
        left = "" if rest == 1 else f"{'M' if self.mixed else ''}{rest} x "
        return f"H {left}{self.n}" + ("" if self.seed is None else f" seed {self.seed}")


@functools.lru_cache(maxsize=64)
def _parts(rotation: Rotation) -> tuple[np.ndarray | None, tuple[np.ndarray | None, ...]]:
    """Signs [D] or None; M (None: the identity) and the factors of H."""
    rest = rotation.d // rotation.n
    if rotation.seed is None:
        return None, (np.eye(1) if rest == 1 else None, *_factors(rotation.n))
    rng = np.random.default_rng((rotation.seed, rotation.d))
    signs = rng.choice([-1.0, 1.0], rotation.d)
    if rest == 1 or not rotation.mixed:
        return signs, (None, *_factors(rotation.n))
    q, r = np.linalg.qr(rng.standard_normal((rest, rest)))
    return signs, (q * np.sign(np.diagonal(r)), *_factors(rotation.n))


def _kron(x, mats, contract):
    """x [..., D] times the Kronecker product of square matrices; None in the first place: the identity of what is left."""
    widths = [len(m) for m in mats if m is not None]
    shape = (x.shape[-1] // math.prod(widths), *widths) if mats[0] is None else tuple(widths)
    lead = x.ndim - 1
    y = x.reshape(*x.shape[:-1], *shape)
    for i, m in enumerate(mats):
        if m is not None and len(m) > 1:
            y = contract(y, m, lead + i)
    return y.reshape(x.shape)


def _contract(x, m, axis):
    y = jnp.tensordot(x, jnp.asarray(m, jnp.float32), axes=(axis, 0), precision="highest")
    return jnp.moveaxis(y, -1, axis)


def _contract_float64(x, m, axis):
    return np.moveaxis(np.tensordot(x, m, axes=(axis, 0)), -1, axis)

"""OSCAR: keys and values rotated by what attention reads of them, on calibration text, and stored in two bits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from optx import ir
from optx.errors import PassError
from optx.formats import Affine, Format, Int
from optx.hadamard import Rotation, block
from optx.ir import replace
from optx.nn.attention import Attention
from optx.nn.rotated import CalibratedHeads
from optx.passes.rotated_kv import RotatedKV, check, rotated_kv
from optx.registry import Axis, Noted, SeenBlock, Site, Skipped, Stage, register

DAMP = 1e-3  # of the mean eigenvalue, added to covariances that are inverted
LEAST = 16  # tokens for each number of a head, below which a covariance means little


@dataclasses.dataclass(frozen=True, kw_only=True)
class Oscar(RotatedKV):
    bits: int = 2  # of keys and values: 2, 3, 4 or 8
    group: int | None = None  # numbers of a head that share a scale; None: all of them
    least: bool = False  # the least number of a group beside each scale, float16, in place of a zero point of 8 bits
    balanced: bool = False  # keys of each kv head scaled as well as rotated, against its queries
    key_clip: float = 0.96  # share of a group's range that codes span, for keys
    value_clip: float = 0.92  # the same for values
    first: int = 64  # tokens of a sequence that stay exact; calibration leaves them out
    recent: int = 256  # newest tokens that stay exact
    context: int | None = 4096  # tokens over which the windows of the text are spread out; None: all of them begin at 0

    @property
    def needs(self):
        return frozenset({"inputs"})

    def formats(self, attn: Attention) -> dict[str, Format]:
        clips = {"k": self.key_clip, "v": self.value_clip}
        kind = Affine if self.least else functools.partial(Int, symmetric=False)
        return {name: kind(width=self.bits, group=self.group, clip=clip) for name, clip in clips.items()}


@register("oscar", axis=Axis.BITS, stage=Stage.FOLD, options=Oscar, exact=False)
def oscar(site: Site, attn: Attention, opt: Oscar) -> Attention | Noted | Skipped:
    """k' = k R_K and q' = q R_K after their positions, v' = v R_V and R_V^T o, with R = U H P: U the eigenvectors of

    C_K = mean over kv heads of E[q q^T],   C_V = mean of E[w v v^T] / E[w],   w_t = k_t^T E[q q^T] k_t,

    H a Hadamard matrix and P the bit reversal of the eigenvalues' order, so that each group has its share of large ones. One R a
    layer; integers with a zero point whose codes span `clip` of a group's range; the first and the newest tokens exact.

    balanced: k' = k A_h and q' = q A_h^-T with A_h A_h^T = C_k^-1 # C_q, the geometric mean (Bhatia 2007, Positive Definite
    Matrices, chapter 4) of what kv head h keeps and is read with: of all transforms that one leaves the least error to
    logits, tr(A^T C_k A) tr(A^-1 C_q A^-T), where errors of codes are alike in all numbers of a group and grow with its size.
    Its axes are interleaved over groups by what keys have along them, with a Hadamard matrix in each group; values likewise
    along the eigenvectors of C_V.

    OSCAR (FutureMLS-Lab/OSCAR, rotation/compute_kv_rotation.py). Queries are those that read a kv head; the inputs are what the
    layer sees with the layers before it compressed.
    """
    check(site, attn, "oscar")
    if opt.context is not None and opt.context < 1:
        raise PassError(f"oscar at {site.path}: context {opt.context}; allowed: tokens, at least 1, or null")
    if attn.cache.share is not None:
        return Skipped(f"reads the cache of layer {attn.cache.share}")
    rope = CalibratedHeads(attn.rope, attn.head_dim, attn.kv_heads if opt.balanced else None)
    if ir.is_abstract(attn):
        return rotated_kv(site, attn, opt, rope, lambda w: w)
    if not isinstance(site.seen, SeenBlock) or not site.seen.inputs:
        raise PassError(f"oscar at {site.path}: no statistics of its inputs; compile with calibration text")
    queries, read, kept = covariances(site, attn, opt.first, opt.context)
    if opt.balanced:
        group = opt.group or attn.head_dim
        found = zip(*(balanced(*each, group) for each in zip(kept, queries, strict=True)), strict=True)
        keys, queries = (jnp.asarray(np.stack(each), jnp.float32) for each in found)
        values = interleaved(*np.linalg.eigh(read), group)
        rope = replace(rope, matrix=queries, key_matrix=keys)
    else:
        keys, values = rotation(queries.mean(0)), rotation(read)
        rope = replace(rope, matrix=jnp.asarray(keys, jnp.float32))
    return rotated_kv(site, attn, opt, rope, lambda w: w @ values)


def rotation(covariance: np.ndarray) -> np.ndarray:
    """float64[H, H]: U H P."""
    sizes, vectors = np.linalg.eigh(covariance)
    d = len(sizes)
    order = np.empty(d, int)
    order[bit_reversed(d)] = np.argsort(-sizes)
    return Rotation(d=d).fold(vectors, -1)[:, order]


def balanced(kept: np.ndarray, queries: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """C_k and C_q, float64[H, H] -> A and A^-T."""
    kept, queries = (c + DAMP * np.trace(c) / len(c) * np.eye(len(c)) for c in (kept, queries))
    root, inverse = _power(kept, 0.5), _power(kept, -0.5)
    sizes, vectors = np.linalg.eigh(inverse @ _power(root @ queries @ root, 0.5) @ inverse)
    far = np.einsum("ij,ik,kj->j", vectors, kept, vectors) * sizes
    return interleaved(far, vectors * np.sqrt(sizes), group), interleaved(far, vectors / np.sqrt(sizes), group)


def _power(matrix: np.ndarray, exponent: float) -> np.ndarray:
    """Of a symmetric positive matrix."""
    sizes, vectors = np.linalg.eigh(matrix)
    return vectors * np.maximum(sizes, np.finfo(float).tiny) ** exponent @ vectors.T


def interleaved(sizes: np.ndarray, columns: np.ndarray, group: int) -> np.ndarray:
    """columns float64[H, H] dealt out to the groups by falling size, then a Hadamard matrix in each group."""
    d = len(sizes)
    order = np.argsort(-sizes).reshape(group, d // group).T.reshape(d)
    return Rotation(d=d, size=block(group)).fold(columns[:, order], -1)


def bit_reversed(d: int) -> list[int]:
    """0 .. d - 1 by their bits read backwards."""
    bits = (d - 1).bit_length()
    return sorted(range(d), key=lambda i: int(f"{i:0{bits}b}"[::-1], 2))


def covariances(
    site: Site, attn: Attention, first: int, context: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """E[q q^T] of the queries of each kv head, float64[K, H, H], C_V, float64[H, H], and E[k k^T] of each head [K, H, H], over
    tokens behind the `first` of each window. context: windows are moved to places between 0 and there, as rotary embeddings
    turn the slow numbers of a head further in long sequences than in short ones.

    Raises: PassError for too few tokens, and for numbers that are none.
    """
    places = [np.asarray(ragged.positions) for _, ragged, _ in site.seen.inputs]
    moved = _spread(places, context)
    inputs = [
        (x, jnp.asarray(at), at_ >= first) for (x, *_), at, at_ in zip(site.seen.inputs, moved, places, strict=True)
    ]
    tokens = sum(int(seen.sum()) for *_, seen in inputs)
    if tokens < (need := LEAST * attn.head_dim):
        raise PassError(
            f"oscar at {site.path}: {tokens:,} tokens of calibration text behind the first {first} of a window, for covariances "
            f"of {attn.head_dim} numbers; at least {need:,} are needed: give a longer text, or more in recipe.calibration "
            "(windows, context)"
        )
    graph, state = nnx.split(attn)
    queries, values = _sums_of(graph)
    gram = sum(np.asarray(queries(state, *each), np.float64) for each in inputs)
    gram /= tokens * (attn.heads // attn.kv_heads)
    sums = [values(state, jnp.asarray(gram, jnp.float32), *each) for each in inputs]
    weighted, weights, kept = (sum(np.asarray(each, np.float64) for each in part) for part in zip(*sums, strict=True))
    found = gram, (weighted / np.maximum(weights, np.finfo(float).tiny)[:, None, None]).mean(0), kept / tokens
    if not all(np.isfinite(c).all() for c in found):
        raise PassError(
            f"oscar at {site.path}: NaN or Inf in its queries, keys or values; look at the weights before it"
        )
    return found


def _spread(places: list[np.ndarray], context: int | None) -> list[np.ndarray]:
    """Positions of windows, each from 0 on, moved so that the windows lie evenly between 0 and `context`."""
    ends = np.cumsum([np.sum(at == 0) for at in places])
    room = max(0, (context or 0) - max(int(at.max()) + 1 for at in places))
    moved = []
    for at, end in zip(places, ends, strict=True):
        window = np.cumsum(at == 0) - 1 + end - np.sum(at == 0)
        moved.append((at + window * room // max(1, int(ends[-1]) - 1)).astype(np.int32))
    return moved


@functools.lru_cache(maxsize=64)
def _sums_of(graph):
    """(state, x, positions, which count bool[T]) -> sum of q q^T by kv head [K, H, H]; (state, E[q q^T], ..) -> of w v v^T, w,
    k k^T."""
    outer = functools.partial(jnp.einsum, precision="highest")

    def parts(state, x, at, seen):
        attn = nnx.merge(graph, state)
        q, k, v = (part.astype(jnp.float32) for part in attn.turned(x, at))
        q = q.reshape(len(x), attn.kv_heads, -1, attn.head_dim)
        seen = seen[:, None]
        return q * seen[..., None, None], k, v, seen

    def queries(state, x, at, seen):
        q, *_ = parts(state, x, at, seen)
        return outer("tkgh,tkgi->khi", q, q)

    def values(state, gram, x, at, seen):
        _, k, v, seen = parts(state, x, at, seen)
        w = seen * jnp.maximum(outer("tkh,khi,tki->tk", k, gram, k), 0)
        return outer("tk,tkh,tki->khi", w, v, v), w.sum(0), outer("tk,tkh,tki->khi", 1.0 * seen, k, k)

    return jax.jit(queries), jax.jit(values)

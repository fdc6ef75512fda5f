"""Second moments of what heads of attention hold and ask, and the low-rank maps that they give.

y = [keys of all kv heads, values of all], keys normed and before RoPE. From calibration text, or from the weights alone as if
inputs were white noise.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from optx import tensor
from optx.errors import PassError
from optx.ir import replace
from optx.nn.attention import Attention, FusedAttention
from optx.nn.core import Linear, RMSNorm, Rope
from optx.registry import SeenBlock, Site

DAMP = 1e-6  # of a metric's mean eigenvalue, added to it: directions that nothing reads
LEAST = 1e-12  # of the largest energy of queries in a layer, what counts as some


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moments:
    """float64. N query heads, K kv heads, H numbers a head."""

    stored: np.ndarray  # [2KH, 2KH], E[y y^T]
    mean: np.ndarray  # [2KH], E[y]
    queries: np.ndarray  # [N, H, H], E[q q^T], normed and before RoPE


def check_plain(site: Site, attn: Attention, name: str) -> str | None:
    """Why the site stays as it is. Raises PassError for packed weights and for heads that a pass has rewritten already."""
    if isinstance(attn, FusedAttention):
        return "q, k and v are one projection; list fuse_projections in the same recipe, which runs later"
    parts = {"q": attn.q, "k": attn.k, "v": attn.v, "o": attn.o}
    for path, part in parts.items():
        if part is not None and (type(part) is not Linear or tensor.is_packed(part.weight.get_value())):
            raise PassError(f"{name} at {site.path}/{path}: wants a dense weight; load with weights='dense'")
    if (
        attn.cache.packed
        or attn.key_bias is not None
        or not attn.cache.rotated
        or not isinstance(attn.rope, Rope | None)
    ):
        raise PassError(
            f"{name} at {site.path}: another pass has chosen how keys are stored ({attn.cache}, {attn.rope}); start from the "
            "checkpoint, with this pass before that one"
        )
    return None


def moments(site: Site, attn: Attention, calibrated: bool, name: str) -> Moments:
    """Of the site's calibration text where `calibrated`, else of its weights. Raises PassError for missing or unusable text."""
    if not calibrated:
        return of_weights(attn)
    if not isinstance(site.seen, SeenBlock) or not site.seen.inputs:
        raise PassError(f"{name} at {site.path}: no statistics of its inputs; compile with calibration text")
    return of_inputs(site, attn, name)


def of_inputs(site: Site, attn: Attention, name: str) -> Moments:
    graph, state = nnx.split(attn)
    run, total, tokens = _sums_of(graph), None, 0
    for x, *_ in site.seen.inputs:
        tokens += x.shape[0]
        sums = [np.asarray(part, np.float64) for part in run(state, x)]
        total = sums if total is None else [a + b for a, b in zip(total, sums, strict=True)]
    stored, mean, queries = (part / tokens for part in total)
    if not all(np.isfinite(part).all() for part in (stored, queries)):
        raise PassError(
            f"{name} at {site.path}: NaN or Inf in its queries, keys or values; look at the weights before it"
        )
    return Moments(stored=stored, mean=mean, queries=queries)


@functools.lru_cache(maxsize=64)
def _sums_of(graph):
    def run(state, x):
        attn = nnx.merge(graph, state)
        q, k, v = attn.project(x)
        q = q if attn.gate is None else jnp.split(q, 2, axis=-1)[0]
        q, k = (y if norm is None else norm(y) for norm, y in ((attn.q_norm, q), (attn.k_norm, k)))
        y = jnp.concatenate([part.reshape(len(x), -1).astype(jnp.float32) for part in (k, v)], axis=-1)
        q = q.astype(jnp.float32)
        outer = functools.partial(jnp.einsum, precision="highest")
        return outer("ti,tj->ij", y, y), y.sum(0), outer("tnh,tni->nhi", q, q)

    return jax.jit(run)


def weights_of(attn: Attention, q: jax.Array, k: jax.Array) -> jax.Array:
    """Attention of whole sequences: q [B, S, N, H], k [B, S, K, H] as `turned` makes them -> float32[B, K, N / K, S, S], queries
    before keys."""
    b, length, kv_heads, h = k.shape
    q = q.reshape(b, length, kv_heads, -1, h)
    logits = jnp.einsum("bqkgh,bskh->bkgqs", q, k, preferred_element_type=jnp.float32) * attn.scale
    logits = logits if attn.softcap is None else attn.softcap * jnp.tanh(logits / attn.softcap)
    at = jnp.arange(length)
    logits = jnp.where(attn.mask(at[:, None], at), logits, -jnp.inf)
    if attn.sinks is not None:  # takes part in the softmax, and is no key
        sink = attn.sinks.get_value().astype(jnp.float32).reshape(1, kv_heads, -1, 1, 1)
        logits = jnp.concatenate([logits, jnp.broadcast_to(sink, (*logits.shape[:-1], 1))], axis=-1)
    return jax.nn.softmax(logits, axis=-1)[..., :length]


def of_weights(attn: Attention) -> Moments:
    """As if inputs were white noise: E[y y^T] = W^T W + b b^T; normed heads have H numbers of mean square 1 before the gain."""
    q = by_head(attn.q, attn.heads)[..., : attn.head_dim]
    k, v = by_head(attn.k, attn.kv_heads), by_head(attn.v, attn.kv_heads)
    y = np.concatenate([part.reshape(len(part), -1) for part in (_normed(k, attn.k_norm), v)], axis=1)
    q = _normed(q, attn.q_norm)
    return Moments(stored=y.T @ y, mean=y[-1], queries=np.einsum("dnh,dni->nhi", q, q))


def _normed(w: np.ndarray, norm: RMSNorm | None) -> np.ndarray:
    """w [D + 1, K, H] of heads as a norm leaves them."""
    if norm is None:
        return w
    return w * gain(norm) / np.sqrt(np.mean(np.sum(w * w, axis=0), axis=-1))[None, :, None]


def gain(norm: RMSNorm) -> np.ndarray:
    """float64[H], what a norm multiplies by."""
    return as_float64(norm.weight) + norm.offset


def by_head(linear: Linear, heads: int) -> np.ndarray:
    """float64[D + 1, heads, H]: the weight with the bias (0 without one) as its last row."""
    weight = as_float64(linear.weight)
    bias = np.zeros(weight.shape[1]) if linear.bias is None else as_float64(linear.bias)
    return np.concatenate([weight, bias[None]]).reshape(weight.shape[0] + 1, heads, -1)


def as_float64(variable: nnx.Variable) -> np.ndarray:
    return np.asarray(jax.device_get(variable.get_value()), np.float64)


def with_rows(linear: Linear, rows: np.ndarray) -> Linear:
    """The projection with `by_head`'s [D + 1, ...] as its weight and, where it has one, its bias."""
    rows, dtype = rows.reshape(len(rows), -1), linear.weight.get_value().dtype
    bias = {} if linear.bias is None else {"bias": jnp.asarray(rows[-1], linear.bias.get_value().dtype)}
    return replace(linear, weight=jnp.asarray(rows[:-1], dtype), **bias)


def of_width(linear: Linear, width: int) -> Linear:
    """The same in shapes, with `width` outputs."""
    shape = lambda x, *lead: jax.ShapeDtypeStruct((*lead, width), x.get_value().dtype)  # noqa: E731
    bias = {} if linear.bias is None else {"bias": shape(linear.bias)}
    return replace(linear, weight=shape(linear.weight, linear.weight.get_value().shape[0]), **bias)


def principal(
    moment: np.ndarray, metrics: Sequence[np.ndarray], rank: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(down [n, rank], up [rank, n], what each direction holds [n]): y ~ y down up with the least E|(y - y down up) T|^2.

    moment [n, n]: E[y y^T]; metrics: T T^T in blocks along y, damped. The whitened truncation of SVD-LLM (arXiv:2403.07378):
    T^T E[y y^T] T = Q S Q^T, down = T Q_r, up = Q_r^T T^-1, so no inverse of the moment is taken.
    """
    roots = [_root(block) for block in metrics if len(block)]
    t, inverse = (block_diagonal([pair[i] for pair in roots]) for i in range(2))
    sizes, vectors = np.linalg.eigh(t.T @ moment @ t)
    top = vectors[:, ::-1][:, :rank]
    return t @ top, top.T @ inverse, sizes[::-1]


def _root(metric: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The damped metric's symmetric root and the root's inverse."""
    sizes, vectors = np.linalg.eigh(metric)
    floor = DAMP * max(sizes.mean(), np.finfo(float).tiny)
    sizes = np.sqrt(np.maximum(sizes, 0) + floor)
    return (vectors * sizes) @ vectors.T, (vectors / sizes) @ vectors.T


def block_diagonal(blocks: Sequence[np.ndarray]) -> np.ndarray:
    out = np.zeros(tuple(np.sum([block.shape for block in blocks], axis=0)))
    row = column = 0
    for block in blocks:
        rows, columns = block.shape
        out[row : row + rows, column : column + columns] = block
        row, column = row + rows, column + columns
    return out


def planes(moment: np.ndarray, asked: np.ndarray | None, first: np.ndarray, second: np.ndarray, count: int):
    """Keys of K heads as complex numbers k_c = first + i second, c = (head, one of F pairs): their `count` principal components.

    moment [K, H, K, H]; asked [K, H, H]: E[q q^T], whose energy an error is weighed by; None: all alike; first, second int[F].
    -> (down, up complex[K, F, count], energies ascending): k' = sum_c down_c k_c, k_c ~ conj(up_c) k', and q' = q up_c.
    """
    aa, bb, ba, ab = (
        moment[:, one][:, :, :, two].reshape(len(moment) * len(first), -1)
        for one, two in ((first, first), (second, second), (second, first), (first, second))
    )
    weight = np.ones(len(aa))
    if asked is not None:
        energy = np.einsum("khh->kh", asked)
        # Of a pair that no query asks for any direction will do, but one that float32 holds.
        least = max(LEAST * energy.max(), np.finfo(float).tiny)
        weight = np.sqrt(np.maximum(energy[:, first] + energy[:, second], least)).reshape(-1)
    sizes, vectors = np.linalg.eigh(weight[:, None] * (aa + bb + 1j * (ba - ab)) * weight)
    top = vectors[:, ::-1][:, :count].conj()
    shape = (len(moment), len(first), count)
    return (top * weight[:, None]).reshape(shape), (top / weight[:, None]).reshape(shape), sizes


def pairs_of(attn: Attention) -> np.ndarray:
    """int[P, 2]: numbers of a head that RoPE turns against each other, by frequency."""
    if attn.rope is None:
        return np.empty((0, 2), int)
    turned = np.arange(attn.rope.dim)
    return turned.reshape(-1, 2) if attn.rope.interleaved else turned.reshape(2, -1).T


def value_metrics(attn: Attention) -> np.ndarray:
    """float64[K, H, H]: sum of W_o W_o^T over the query heads that read a kv head: what an error of its values costs."""
    o = as_float64(attn.o.weight).reshape(attn.kv_heads, -1, attn.head_dim, attn.o.weight.get_value().shape[1])
    return np.einsum("kghd,kgid->khi", o, o)


def readers(attn: Attention, order: Sequence[int], queries: np.ndarray, outputs: np.ndarray) -> dict:
    """q, o and sinks with the query heads in the `order` of the kv heads that they read, and of those that read g: q queries_g
    (gates stay) and outputs_g W_o, maps float64[K, H, H]."""
    shared = attn.heads // attn.kv_heads
    heads = np.concatenate([np.arange(g * shared, (g + 1) * shared) for g in order])
    q, o = by_head(attn.q, attn.heads), as_float64(attn.o.weight).reshape(attn.heads, attn.head_dim, -1)
    asked = np.einsum("dnh,nhi->dni", q[..., : attn.head_dim], np.repeat(queries, shared, axis=0))
    q = np.concatenate([asked, q[..., attn.head_dim :]], axis=-1)[:, heads]
    o = np.einsum("nhi,nid->nhd", np.repeat(outputs, shared, axis=0), o)[heads]
    weight = jnp.asarray(o.reshape(-1, o.shape[-1]), attn.o.weight.get_value().dtype)
    sinks = attn.sinks if attn.sinks is None else attn.sinks.get_value()[heads]
    return {"q": with_rows(attn.q, q), "o": replace(attn.o, weight=weight), "sinks": sinks}


def turn(z: complex) -> np.ndarray:
    """[a, b] @ it = the parts of (a + b i) z."""
    return np.array([[z.real, z.imag], [-z.imag, z.real]])

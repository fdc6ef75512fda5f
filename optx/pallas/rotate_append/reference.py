"""rotate_append in plain JAX: what stands between the projections of a layer and its attention."""

import jax.numpy as jnp

from optx import near
from optx.cache import CacheSpec, Ragged, View


def rotate_append(
    q,
    k,
    v,
    pool,
    *,
    positions,
    writes,
    spec: CacheSpec,
    rope=None,
    q_norm=None,
    k_norm=None,
    view: View | None = None,
    ragged: Ragged | None = None,
):
    """Queries and keys normalised and rotated; keys and values stored, in the spec's format, at their slots.

    q = rope(q_norm(q)), k = rope.keys(k_norm(k)); pool[writes] = format(k), format(v)

    q [T, N, H], k and v [T, K, H], or all heads side by side in q [T, N + 2K, H] and None for k and v; pool {"k", "v"}
    of [pages + 1, K, P, H], dense or QTensor; positions int32[T]; writes int32[T], or by head int32[K, T], flat slots
    page * P + offset: what they say past page `pages` - 1 is stored nowhere that is read. rope: (x [T, N, H],
    positions) -> x, arXiv:2104.09864; norms: x -> x over the last axis, arXiv:1910.07467; None: not applied. view,
    ragged: where the spec keeps tokens exact as well (near.py), the layer's tables and whose the tokens are.
    -> (q [T, N, H], pool).
    """
    q, k, v = separate(q, k, v, spec)
    q, k = rotate(q, q_norm, rope, positions), rotate_keys(k, k_norm, rope, positions)
    new = {"k": k, "v": v}
    if spec.near is None:
        return q, spec.append(pool, new, writes)
    return q, near.append(spec, new, view, ragged)


def separate(q, k, v, spec: CacheSpec):
    """q, k and v as arrays of their own."""
    if k is not None:
        return q, k, v
    kv_heads = spec.streams[0].shape[0]
    return jnp.split(q, [q.shape[1] - 2 * kv_heads, q.shape[1] - kv_heads], axis=1)


def rotate(x, norm, rope, positions):
    """x [T, N, H], normalised and then rotated."""
    x = x if norm is None else norm(x)
    return x if rope is None else rope(x, positions)


def rotate_keys(k, norm, rope, positions):
    """k [T, K, H] likewise, by what stands in `rope` for keys."""
    return rotate(k, norm, None if rope is None else rope.keys, positions)

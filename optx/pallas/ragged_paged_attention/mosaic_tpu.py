"""Mixed prefill chunks and decodes over paged caches on TPU: the kernel of paged_decode over blocks of ragged queries.

Every row's tokens are cut into blocks; a block is one item of the kernel, so a tick of many decodes and a few chunks is
one launch without padding of rows to the longest. At most T / block + B items exist; the rest do nothing.
"""

import functools
import math

import jax
import jax.numpy as jnp

from optx.cache import Ragged
from optx.errors import FormatError
from optx.pallas.attention.reference import Mask
from optx.pallas.paged_decode.mosaic_tpu import Items, Pools, check, run, supports, tiles_for

__all__ = ["ragged_paged_attention", "supports"]


def ragged_paged_attention(
    q,
    k_pool,
    v_pool,
    *,
    ragged: Ragged,
    positions,
    table,
    lengths,
    mask: Mask = Mask(),
    scale=None,
    softcap=None,
    sink_logits=None,
    logit_scale=None,
    value_dim=None,
    want_scores=False,
    interpret=False,
):
    """Attention of T ragged tokens over their rows' cached tokens, as `attention.reference.ragged_paged_attention`.

    q [T, N, H]; pools, positions, table, lengths, sink_logits, logit_scale as in `paged_decode`.
    -> (out [T, N, Hv], lse float32[T, N], None); what is returned for padding tokens is unspecified.
    Raises: FormatError for shapes that the kernel does not take, and for want_scores.
    """
    check("ragged_paged_attention", q, k_pool, v_pool, table, value_dim, want_scores)
    if q.shape[0] != ragged.rows.shape[0]:
        raise FormatError(f"ragged_paged_attention: q of {q.shape[0]} tokens; allowed: ragged's {ragged.rows.shape[0]}")
    return _ragged(
        q,
        k_pool,
        v_pool,
        ragged,
        positions,
        table,
        lengths,
        sink_logits,
        logit_scale,
        mask=mask,
        scale=1 / math.sqrt(q.shape[-1]) if scale is None else scale,
        softcap=softcap,
        value_dim=value_dim,
        interpret=interpret,
    )


@functools.partial(jax.jit, static_argnames=("mask", "scale", "softcap", "value_dim", "interpret"))
def _ragged(
    q, k_pool, v_pool, ragged: Ragged, positions, table, lengths, sink_logits, logit_scale, *, mask: Mask, **static
):
    tokens, b = q.shape[0], ragged.batch
    tile = tiles_for(q, k_pool, v_pool, table, min(ragged.longest, tokens), decode=False)
    size = tile.queries
    blocks = -(-ragged.counts // size)
    ends = jnp.cumsum(blocks, dtype=jnp.int32)
    first = ends - blocks  # first item of each row
    count = min(b * -(-ragged.longest // size), tokens // size + b)
    item = jnp.arange(count, dtype=jnp.int32)
    row = jnp.sum(item[:, None] >= ends, axis=1, dtype=jnp.int32)
    active = row < b
    row = jnp.minimum(row, b - 1)
    offset = jnp.where(active, (item - first[row]) * size, 0)
    have = jnp.where(active, jnp.minimum(ragged.counts[row] - offset, size), 0)

    index = jnp.clip((ragged.starts[row] + offset)[:, None] + jnp.arange(size), 0, tokens - 1)
    asked = jnp.where(jnp.arange(size) < have[:, None], ragged.positions[index], -1)
    low = lengths[:, row] - ragged.counts[row] + offset
    items = Items(
        rows=row,
        low=low,
        high=low + have if mask.causal else lengths[:, row],
        active=have > 0,
        positions=asked,
    )
    pools = Pools(k=k_pool, v=v_pool, positions=positions, table=table, lengths=lengths)
    out, lse = run(q[index], pools, items, tile, sink_logits, logit_scale, mask=mask, **static)
    mine = jnp.minimum(ragged.rows, b - 1)
    at = jnp.clip(jnp.arange(tokens) - ragged.starts[mine], 0, ragged.longest - 1)
    at = jnp.clip(first[mine] * size + at, 0, count * size - 1)
    flat = lambda x: x.reshape(count * size, *x.shape[2:])[at]  # noqa: E731
    return flat(out), flat(lse), None

"""Attention's side of eviction: what it is asked for beside its output, and where that is recorded."""

from typing import Any

import jax
import jax.numpy as jnp

from optx.cache import RECORDED, CacheSpec, Pool, Ragged, View


def records(spec: CacheSpec) -> bool:
    """Whether attention over the layer's cache is asked for what its tokens attend to."""
    return spec.evict is not None and spec.evict.channels > 0 and spec.share is None


def scoring(spec: CacheSpec, view: View) -> dict[str, Any]:
    """Arguments of an attention op over a cache whose policy records what tokens attend to."""
    if not records(spec):
        return {}
    policy = spec.evict
    if policy.plain:
        return {"want_scores": True}
    assert view.prompts is not None, f"{policy.name} asks for Address.prompts"
    return {"want_scores": True, "score_reduce": policy.reduce, "score_weights": policy.weigh, "prompts": view.prompts}


def record(spec: CacheSpec, pool: Pool, scores: jax.Array | None, ragged: Ragged, view: View) -> Pool:
    """The pool with scores float32[B, S, K] by slot taken into what the policy has recorded of the rows' slots."""
    if scores is None:
        return pool
    stored, table, lengths = pool[RECORDED], view.table[0], view.lengths[0]
    batch, pages = table.shape
    slots = jnp.arange(pages * stored.shape[2], dtype=jnp.int32).reshape(pages, -1)
    before = (lengths - ragged.counts)[:, None, None]
    new = (slots >= before)[:, :, None, :, None]  # their page may have been another row's
    old = jnp.where(new, 0, stored.at[table].get(mode="promise_in_bounds"))
    mass = jnp.swapaxes(scores.reshape(batch, pages, -1, scores.shape[-1]), 2, 3)
    queries = jnp.clip(lengths[:, None, None] - jnp.maximum(slots, before), 0)[:, :, None]
    held = (slots[:, 0] < lengths[:, None]) & (ragged.counts > 0)[:, None]
    recorded = spec.evict.record(old, mass, queries)
    return pool | {RECORDED: stored.at[jnp.where(held, table, stored.shape[0])].set(recorded, mode="drop")}

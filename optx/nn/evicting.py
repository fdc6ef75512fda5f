"""Attention's side of eviction: what it is asked for beside its output, and where that is recorded."""

from typing import Any

import jax
import jax.numpy as jnp

from optx.cache import RECORDED, CacheSpec, Pool, Ragged, View


def _records(spec: CacheSpec) -> bool:
    return spec.evict is not None and spec.evict.channels > 0 and spec.share is None


def scores_asked(spec: CacheSpec, op: str) -> dict[str, bool]:
    """Facts of a call site: whether the op is asked what tokens attend to, and by another rule than the plain sum. Policies that
    compact a prompt once do not ask it of decodes."""
    asked = _records(spec) and (op != "paged_decode" or not spec.evict.once)
    return {"want_scores": asked, "score_rule": asked and not spec.evict.plain}


def scoring(spec: CacheSpec, ragged: Ragged, view: View) -> dict[str, Any]:
    """Arguments of `attend_cached` over a cache whose policy records what tokens attend to. What is a token a row and no more is
    no prompt."""
    if not _records(spec) or (spec.evict.once and ragged.rectangular and ragged.longest == 1):
        return {}
    policy = spec.evict
    if policy.plain:
        return {"want_scores": True}
    assert view.prompts is not None or not policy.once, f"{policy.name} asks for Address.prompts"
    rule = {"score_reduce": policy.reduce, "score_weights": policy.weigh, "prompts": view.prompts}
    return {"want_scores": True, "chunked": policy.once, **rule}


def record(spec: CacheSpec, pool: Pool, scores: jax.Array | None, ragged: Ragged, view: View) -> Pool:
    """The pool with scores float32[B, S, K] by slot taken into what the policy has recorded of the rows' slots."""
    if scores is None:
        return pool
    stored, heads = pool[RECORDED], jnp.arange(scores.shape[-1])[:, None]
    _, batch, pages = view.table.shape
    table, lengths = (jnp.moveaxis(x, 0, 1) for x in (view.table, view.lengths))  # [B, G, pages], [B, G]
    table = jnp.broadcast_to(table, (batch, len(heads), pages))
    slots = jnp.arange(pages * stored.shape[2], dtype=jnp.int32).reshape(pages, -1)
    before = (lengths - ragged.counts[:, None])[:, :, None, None]
    new = (slots >= before)[..., None]  # their page may have been another row's
    old = jnp.where(new, 0, stored.at[table, heads].get(mode="promise_in_bounds"))
    mass = jnp.swapaxes(scores, 1, 2).reshape(batch, len(heads), pages, -1)
    queries = jnp.clip(lengths[:, :, None, None] - jnp.maximum(slots, before), 0)
    held = (slots[:, 0] < lengths[..., None]) & (ragged.counts > 0)[:, None, None]
    recorded = spec.evict.record(old, mass, queries)
    at = jnp.where(held, table, stored.shape[0]), heads
    return pool | {RECORDED: stored.at[at].set(recorded, mode="drop")}

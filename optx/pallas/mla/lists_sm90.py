"""`paged_decode` over the few pages of MLA latents that a selection lists, packed or with logit scales by kv head, on Hopper.

What is listed is unpacked into dense pages by XLA, and the kernel over latents reads those. Query heads under one scale are rows
of their own, so that a scale is one number a token as the kernel takes it; the latents that these rows share come from L2.
"""

import dataclasses

import jax
import jax.numpy as jnp

from optx.pallas.mla import mosaic_gpu_sm90 as latents
from optx.tensor import dense


def supports(args, target) -> str | None:
    if not args.get("selected"):
        return "reads what a selection lists, not whole contexts"
    scales, streams = args.get("logit_scales", 0), args["cache"].streams
    if scales > 1 and args.get("sink_logits"):
        return f"{scales} scales of logits a token with logits of sinks; allowed: one of the two"
    plain = tuple(dataclasses.replace(stream, format=None) for stream in streams)
    runs = max(scales, 1)
    heads = args["heads"] if runs == 1 else -(-args["heads"] // runs // 8) * 8
    cache = args["cache"].replace(streams=plain, format=None)
    return latents.supports({**args, "cache": cache, "heads": heads, "logit_scales": min(scales, 1)}, target)


def paged_decode(
    q, k_pool, v_pool=None, *, positions, table, lengths, q_positions, logit_scale=None, sink_logits=None, **kwargs
):
    """As the reference: k_pool [pages + 1, 1, P, R + Hr] dense or packed, logit_scale [pages + 1, K, P] for K runs of heads.
    Raises: LoweringError for what the kernel does not take."""
    at = table[0].reshape(-1)
    take = lambda part: part.at[at].get(mode="promise_in_bounds")  # noqa: E731
    k_pool, positions = dense(jax.tree.map(take, k_pool)).astype(q.dtype), take(positions)
    table = jnp.arange(at.size, dtype=jnp.int32).reshape(table.shape)
    logit_scale = None if logit_scale is None else take(logit_scale)
    where = {"positions": positions, "table": table, "lengths": lengths, "q_positions": q_positions}
    if logit_scale is None or logit_scale.shape[1] == 1:
        more = {"logit_scale": logit_scale, "sink_logits": sink_logits}
        return latents.paged_decode(q, k_pool, v_pool, **where, **more, **kwargs)
    b, queries, n, h = q.shape
    runs = logit_scale.shape[1]
    each = n // runs
    q = jnp.moveaxis(q.reshape(b, queries, runs, each, h), 2, 1).reshape(b * runs, queries, each, h)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, -each % 8), (0, 0)))
    where |= {name: jnp.repeat(where[name], runs, axis=1) for name in ("table", "lengths")}
    where["q_positions"] = jnp.repeat(q_positions, runs, axis=0)
    more = {"logit_scale": logit_scale, "sink_logits": sink_logits}
    out, lse, _ = latents.paged_decode(q, k_pool, v_pool, **where, **more, **kwargs)

    def apart(x):
        return jnp.moveaxis(x[:, :, :each].reshape(b, runs, queries, each, -1), 1, 2).reshape(b, queries, n, -1)

    return apart(out), apart(lse)[..., 0], None

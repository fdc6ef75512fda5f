"""Mixture of sparse attention: each kv head keeps the tokens that a router of its own chooses as they come."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from optx import ir
from optx.errors import PassError
from optx.nn.attention import Attention
from optx.nn.mla import MLA
from optx.nn.token_router import BlockRouter, TokenRouter
from optx.passes import head_moments as heads
from optx.passes.selection import refusal, with_selector
from optx.registry import Axis, Noted, PassOptions, SeenBlock, Site, Skipped, Stage, register

RIDGE = 1e-2  # of the mean variance of the router's inputs, added to each
LEAST = 1e-4  # attention that a token receives at least, of what it would if all were attended to alike: its logarithm is taken
NOTE = "pages hold all tokens, read under a mask: no bytes are saved"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mosa(PassOptions):
    sparsity: float = 4.0  # a kv head keeps one token of so many, on calibration text
    window: int = 128  # newest tokens, always seen
    sinks: int = 4  # first tokens, always seen; 0: none
    # Tokens that are kept or not together, a multiple of the page size: decodes then read what is kept and nothing else.
    block: int = 1

    @property
    def needs(self):
        return frozenset({"inputs"})


@register("mosa", axis=Axis.READS, stage=Stage.ATTENTION, options=Mosa, exact=False, needs_healing=True)
def mosa(site: Site, attn: Attention | MLA, opt: Mosa) -> Attention | Noted | Skipped:
    """softmax(scale q k^T) v over the `window` newest tokens, the `sinks` first and those s that the kv head keeps:
    sigmoid(x_s W + b) > 1/2, x_s being what enters the layer.

    MoSA (Piekos et al. 2025, arXiv:2505.00315), for decodes: where the paper takes the T / sparsity tokens of the highest score
    of a sequence, b is the threshold that so many exceed on calibration text. W is the ridge regression of the logarithm of the
    attention that a token receives from beyond the window, of all query heads of the kv head, on x; healing lets the model learn
    to live with it and leaves it as it is. Differs from the paper: all queries are kept, and so are newest and first tokens,
    without which a model that was not trained so does not work (StreamingLLM, arXiv:2309.17453); what a head brings is not
    multiplied by its score. Exact where window and sinks hold the context.

    With `block` whole blocks are kept, by the mean of x_s W + b over their tokens, and blocks with a token of window or sinks are
    seen: decodes read pages of these alone. Single tokens lie among others in their pages, which are all read under a mask.
    """
    if reason := refusal(site, attn, "mosa", {"window": opt.window, "block": opt.block}):
        return Skipped(reason)
    if not 1 < opt.sparsity < 2**31:
        raise PassError(f"mosa: sparsity {opt.sparsity:g}; allowed: above 1 and below 2^31 tokens of which one is kept")
    if not 0 <= opt.sinks < 2**31:
        raise PassError(f"mosa: sinks {opt.sinks}; allowed: 0 to {2**31 - 1}")
    shape = {"kv_heads": attn.kv_heads, "window": opt.window, "sinks": opt.sinks, "share": 1 / opt.sparsity}
    dtype = attn.o.weight.get_value().dtype
    kind = TokenRouter if opt.block == 1 else functools.partial(BlockRouter, block=opt.block)
    selector = kind(attn.q.weight.get_value().shape[0], **shape, dtype=dtype)
    if not ir.is_abstract(attn):
        weight, bias = _fitted(site, attn, opt)
        router = ir.replace(selector.router, weight=jnp.asarray(weight, dtype), bias=jnp.asarray(bias, dtype))
        selector = ir.replace(selector, router=router)
    chosen = with_selector(attn, selector)
    return Noted(chosen, NOTE) if opt.block == 1 else chosen


def _fitted(site: Site, attn: Attention, opt: Mosa) -> tuple[np.ndarray, np.ndarray]:
    """(W float64[D, K], b float64[K]) of calibration text. Raises PassError for text that is missing, too short or no numbers."""
    if not isinstance(site.seen, SeenBlock) or not site.seen.inputs:
        raise PassError(f"mosa at {site.path}: no statistics of its inputs; compile with calibration text")
    calls = [(x, ragged) for x, ragged, *_ in site.seen.inputs]
    if (length := calls[0][1].longest) <= opt.window + opt.sinks + 1:
        raise PassError(
            f"mosa at {site.path}: calibration texts of {length} tokens, of which a window of {opt.window} and {opt.sinks} sinks "
            "hide none or one; set calibration: {context: N} in the recipe to more, or take a smaller window"
        )
    graph, state = nnx.split(attn)
    run, parts, means = _received(graph, opt.window), [], []
    for x, ragged in calls:
        seen = slice(
            opt.sinks, length - opt.window
        )  # tokens that are not kept in any case, and that somebody sees from afar
        inputs, mass = (np.asarray(part, np.float64)[:, seen] for part in (ragged.pad(x), run(state, x, ragged)))
        parts.append((inputs.reshape(-1, inputs.shape[-1]), mass.reshape(-1, mass.shape[-1])))
        skip = -opt.sinks % opt.block  # to the first whole block
        blocks = inputs[:, skip : skip + (inputs.shape[1] - skip) // opt.block * opt.block]
        means.append(blocks.reshape(-1, opt.block, inputs.shape[-1]).mean(1))
    x, y = (np.concatenate(part) for part in zip(*parts, strict=True))
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise PassError(f"mosa at {site.path}: NaN or Inf in its inputs or attention; look at the weights before it")
    centred, y = x - x.mean(0), np.log(np.maximum(y, LEAST))
    gram = centred.T @ centred
    damped = gram + RIDGE * max(np.trace(gram) / len(gram), np.finfo(float).tiny) * np.eye(len(gram))
    weight = np.linalg.solve(damped, centred.T @ (y - y.mean(0)))
    if not sum(map(len, means)):
        raise PassError(
            f"mosa at {site.path}: calibration texts of {length} tokens hold no block of {opt.block} beside a window of "
            f"{opt.window} and {opt.sinks} sinks; set calibration: {{context: N}} in the recipe to more, or take a smaller block"
        )
    return weight, -np.quantile(np.concatenate(means) @ weight, 1 - 1 / opt.sparsity, axis=0)


@functools.lru_cache(maxsize=64)
def _received(graph, window: int):
    """-> a function of (state, x [T, D], ragged): float32[B, S, K], mean over queries t >= s + window of t + 1 times the
    attention that they pay to token s, summed over the query heads of a kv head: 1 a head where they attend to all alike."""

    def run(state, x, ragged):
        attn = nnx.merge(graph, state)
        q, k, _ = attn.turned(x, ragged.positions)
        at = jnp.arange(ragged.longest)
        far = at[:, None] - at >= window

        def of_row(row):
            weights = heads.weights_of(attn, *(part[None] for part in row))[0]
            return jnp.einsum("kgts,ts->sk", weights, far * (at[:, None] + 1.0))

        received = jax.lax.map(of_row, (ragged.pad(q), ragged.pad(k)))
        return received / jnp.maximum(jnp.sum(far, axis=0), 1)[:, None]

    return jax.jit(run)

"""Outliers of activations moved into weights, before both are rounded to 8 bits."""

import dataclasses

import jax.numpy as jnp

from optx import ir
from optx.errors import PassError
from optx.nn.decoder import Block
from optx.passes import folding
from optx.registry import Axis, Noted, SeenBlock, Site, Skipped, Stage, register

LEAST = 1e-5  # of both absolute maxima


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmoothQuant(folding.Smoothing):
    alpha: float = 0.5  # share of the outliers that weights take over: 0 none, 1 all

    @property
    def needs(self):
        return frozenset({"absmax"})


@register("smoothquant", axis=Axis.BITS, stage=Stage.FOLD, options=SmoothQuant, exact=True)
def smoothquant(site: Site, block: Block, opt: SmoothQuant) -> Block | Noted | Skipped:
    """s_j = max|x_j|^alpha / max|W_j|^(1 - alpha): norm.weight / s, and rows of all that reads the norm times s; the same from up
    into down and from values into o.

    Exact; what it is good for comes with quantize_weights and quantize_activations. Xiao et al. 2022, arXiv:2211.10438, which
    moves scales out of norms only.
    """
    if not 0 <= opt.alpha <= 1:
        raise PassError(f"smoothquant at {site.path}: alpha {opt.alpha:g}; allowed: 0 to 1")
    places, refused = folding.folds(block, opt)
    reasons = "; ".join(f"{source}: {reason}" for source, reason in refused.items())
    if not places:
        return Skipped(reasons or "nothing in it reads a norm")
    if not ir.is_abstract(block):
        block = _smoothed(site, block, places, opt)
    return Noted(block, f"left as it was: {reasons}") if reasons else block


def _smoothed(site: Site, block: Block, places, opt: SmoothQuant) -> Block:
    if not isinstance(site.seen, SeenBlock):
        raise PassError(f"smoothquant at {site.path}: no statistics of its inputs; compile with calibration text")
    for fold in places:
        x = folding.seen_of(fold, site.seen.parts, "absmax")
        per_expert = x.ndim > 1
        tops = [jnp.max(jnp.abs(w.astype(jnp.float32)), axis=-1) for w in folding.weights_of(block, fold)]
        tops = [top if per_expert else top.reshape(-1, top.shape[-1]).max(0) for top in tops]
        w = fold.gather(jnp.max(jnp.stack(tops), axis=0), jnp.max)
        if not bool(jnp.all(jnp.isfinite(x)) & jnp.all(jnp.isfinite(w))):
            raise PassError(f"smoothquant at {site.path}/{fold}: NaN or Inf in the weights or in what they read")
        s = jnp.maximum(x, LEAST) ** opt.alpha / jnp.maximum(w, LEAST) ** (1 - opt.alpha)
        s = jnp.where((x > 0) & (w > 0), s, 1)
        block = folding.move(block, fold, s)
    return block

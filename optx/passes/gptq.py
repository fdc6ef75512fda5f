"""Weights rounded one input channel after the other, each error made good by the channels that follow."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular

from optx import tensor
from optx.errors import PassError
from optx.formats import Format, Parts
from optx.ir import replace
from optx.nn.core import Linear
from optx.nn.moe import GroupedLinear
from optx.passes.quantize_weights import QuantizeWeights, Scales, grid_of, weight_of
from optx.registry import Axis, Noted, Seen, Site, Stage, register
from optx.tensor import QTensor

BLOCK = 128  # input channels whose errors are spread over the rest at once
FEW = 0.005  # share of the tokens below which an expert's statistics mean little
AT_ONCE = 8  # experts that are rounded side by side


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTQ(QuantizeWeights):
    damp: float = 0.01  # share of the Gram matrix's mean diagonal that is added to the diagonal
    act_order: bool = True  # channels of large activations first; scales stay those of the groups as they lie

    @property
    def needs(self):
        return frozenset({"gram"})


@register("gptq", axis=Axis.BITS, stage=Stage.WEIGHTS, options=GPTQ, exact=False)
def gptq(site: Site, linear: Linear | GroupedLinear, opt: GPTQ) -> Linear | GroupedLinear | Noted:
    """min |X (W' - W)|^2 over W' in `format`: channel by channel, w_i is rounded and its error, over [U]_ii, is taken out of the
    channels j > i by [U]_ij, with U upper triangular and U^T U = (X^T X / n + damp)^-1.

    Frantar et al. 2022, arXiv:2210.17323; blocks of 128 channels as there, the order of channels by the size of their
    activations with scales fixed before (`static`). Experts are rounded each by the tokens that they were given.
    """
    weight = weight_of(site, linear, opt)
    if isinstance(weight, jax.ShapeDtypeStruct):
        return replace(linear, weight=_round_to(site, weight, opt))
    if not isinstance(site.seen, Seen):
        raise PassError(f"gptq at {site.path}: no statistics of its inputs; compile with calibration text")
    rows, gram = jnp.swapaxes(weight, -1, -2), site.seen.gram
    format_ = _checked(site, weight, opt)
    how = {"scales": opt.scales, "damp": opt.damp, "act_order": opt.act_order}
    parts, factors = solve(rows, gram, format=format_, **how)
    if not bool(jnp.all(jnp.isfinite(factors))):
        raise PassError(
            f"gptq at {site.path}: the Gram matrix of {int(jnp.sum(site.seen.tokens)):,} tokens, with damp {opt.damp:g} on its "
            "diagonal, has no Cholesky factor; give more calibration text or a larger damp"
        )
    packed = QTensor(
        data=parts.data, scale=parts.scale, zero=parts.zero, format=format_, length=weight.shape[-2], dtype=weight.dtype
    )
    return _noted(replace(linear, weight=packed), site.seen)


def _noted(linear, seen: Seen):
    tokens = np.asarray(seen.tokens)
    if tokens.ndim == 0:
        return linear
    few = np.flatnonzero(tokens < FEW * tokens.sum())
    if not few.size:
        return linear
    listed = ", ".join(f"{i} ({tokens[i]})" for i in few[:8]) + (", ..." if few.size > 8 else "")
    return Noted(linear, f"{few.size} of {tokens.size} experts saw under {FEW:.1%} of the tokens: {listed}")


def _round_to(site: Site, weight, opt: GPTQ) -> QTensor:
    return tensor.quantize(weight, _checked(site, weight, opt), axis=-2)


def _checked(site: Site, weight, opt: GPTQ) -> Format:
    format_ = opt.storage()
    if reason := format_.check(weight.shape[-2]):
        raise PassError(f"gptq at {site.path}, weight {list(weight.shape)}: {reason}")
    return format_


# Trying out ways of running the products takes ten seconds of compiling on a GPU and saves nothing.
QUICK = {"xla_gpu_autotune_level": "0"}


@functools.partial(jax.jit, static_argnames=("format", "scales", "damp", "act_order", "block"), compiler_options=QUICK)
def solve(
    rows: jax.Array,
    gram: jax.Array,
    *,
    format: Format,
    scales: Scales = "absmax",
    damp: float = 0.01,
    act_order: bool = True,
    block: int = BLOCK,
) -> tuple[Parts, jax.Array]:
    """rows float[..., F, D], gram float32[..., D, D] -> (Parts, float32[...] that is not finite where a Gram matrix had no
    factor). Channels that were never active are rounded alone."""
    how = {"format": format, "scales": scales, "damp": damp, "act_order": act_order, "block": block}
    if rows.ndim == 2:
        return _solve(rows, gram, **how)
    return jax.lax.map(lambda each: _solve(*each, **how), (rows, gram), batch_size=AT_ONCE)


def _solve(rows, gram, *, format: Format, scales, damp, act_order, block):
    """Of one matrix. D is padded to blocks with channels that do nothing."""
    w, d = rows.astype(jnp.float32), rows.shape[-1]
    diagonal = jnp.diagonal(gram)
    scale, zero = grid_of(format, w, scales, diagonal)
    step, offset = format.steps(scale, zero, d)
    order = jnp.argsort(-diagonal, stable=True) if act_order else jnp.arange(d)
    upper = factor(gram[order][:, order], damp)
    pad = -d % block
    upper = jnp.pad(upper, ((0, pad), (0, pad))) + jnp.diag((jnp.arange(d + pad) >= d).astype(jnp.float32))
    turned = [
        jnp.pad(x[:, order].T, ((0, pad), (0, 0)), constant_values=fill) for x, fill in ((w, 0), (step, 1), (offset, 0))
    ]
    codes = _channels(*turned, upper, format, block)[:d]
    codes = jnp.zeros_like(codes).at[order].set(codes).T
    return format.assemble(codes, scale, zero), jnp.sum(jnp.diagonal(upper))


def factor(gram, damp):
    """Upper triangular U with U^T U = (gram + damp mean(diagonal) I)^-1. With J the reversal, J gram J = L L^T gives
    U = (J L J)^-1."""
    diagonal = jnp.diagonal(gram)
    dead = diagonal <= 0
    mean = jnp.sum(diagonal) / jnp.maximum(jnp.sum(~dead), 1)
    mean = jnp.where(mean > 0, mean, 1)
    damped = gram + jnp.diag(jnp.where(dead, mean, damp * mean))
    lower = jnp.linalg.cholesky(damped[::-1, ::-1])
    return solve_triangular(lower[::-1, ::-1], jnp.eye(gram.shape[0], dtype=jnp.float32), lower=False)


def _channels(w, step, offset, upper, format: Format, block: int):
    """w, step, offset [D, F] -> codes [D, F], D a multiple of `block`."""

    def one(i, state):
        w1, u1, errors, codes, at = state
        here = [jax.lax.dynamic_index_in_dim(x, at + i, keepdims=False) for x in (step, offset)]
        x = w1[i]
        code = format.code(x, *here)
        error = (x - format.value(code, *here)) / u1[i, i]
        w1 = w1 - u1[i][:, None] * error
        return w1, u1, errors.at[i].set(error), codes.at[i].set(code), at

    def run(b, state):
        w, codes = state
        at = b * block
        w1 = jax.lax.dynamic_slice_in_dim(w, at, block)
        rows = jax.lax.dynamic_slice_in_dim(upper, at, block)
        u1 = jax.lax.dynamic_slice_in_dim(rows, at, block, axis=1)
        none = jnp.zeros_like(w1)
        _, _, errors, found, _ = jax.lax.fori_loop(0, block, one, (w1, u1, none, none, at))
        later = jnp.where(jnp.arange(w.shape[0]) >= at + block, rows, 0)
        w = w - jnp.matmul(later.T, errors, precision="highest")
        return w, jax.lax.dynamic_update_slice_in_dim(codes, found, at, axis=0)

    return jax.lax.fori_loop(0, w.shape[0] // block, run, (w, jnp.zeros_like(w)))[1]

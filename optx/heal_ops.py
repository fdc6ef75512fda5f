"""Ops of a training step as hardware wants them: products of 16-bit numbers in both directions, and on NVIDIA GPUs cuDNN's flash
attention, which has a backward pass.

What `jax.grad` makes of the reference ops multiplies float32 gradients and keeps the weights of attention, which took half of a
step of SmolLM2-135M on an H200.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from optx.pallas import dispatch
from optx.pallas.attention import reference as attention
from optx.pallas.grouped_matmul import reference as grouped_matmul
from optx.pallas.matmul import reference as matmul

WIDEST = 128  # numbers of a head that cuDNN takes in both passes on every card since Ampere; fewer are padded
EXPERTS = 16  # up to which all of them run at once: their products cost little beside loops; not measured


def fast() -> Callable:
    """A context for traces of full sequences: the ops run inside in the forms of this file where these take them."""
    return dispatch.through(_run)


def _run(function: Callable, *args, **kwargs):
    if function is matmul.matmul and jnp.dtype(args[1].dtype).itemsize == 2:
        return product(*args)
    if function is grouped_matmul.grouped_matmul and _few_experts(args[1]):
        return grouped(*args)
    if function is attention.flash_attention and declines(*args, **kwargs) is None:
        return _attention(*args, **{name: kwargs.get(name) for name in ("mask", "scale", "chosen", "block")})
    return function(*args, **kwargs)


def _few_experts(w) -> bool:
    return jnp.dtype(w.dtype).itemsize == 2 and len(w) <= EXPERTS and jax.default_backend() != "cpu"


@jax.custom_vjp
def product(x, w):
    """x [..., D] @ w [D, F] of 16 bits -> [..., F] in x's dtype. Operands and gradients are rounded to w's dtype, sums are
    float32; an x of float32 that came from w's dtype loses nothing (Micikevicius et al. 2018, arXiv:1710.03740)."""
    return jnp.matmul(x.astype(w.dtype), w, preferred_element_type=jnp.float32).astype(x.dtype)


def _forward(x, w):
    kept = x.astype(w.dtype)
    return product(x, w), (kept, w, jnp.zeros((), x.dtype))


def _backward(kept, slope):
    x, w, like = kept
    slope = slope.astype(w.dtype)
    of_x = jnp.matmul(slope, w.T, preferred_element_type=jnp.float32).astype(like.dtype)
    flat = (part.reshape(-1, part.shape[-1]) for part in (x, slope))
    of_w = jnp.einsum("td,tf->df", *flat, preferred_element_type=jnp.float32).astype(w.dtype)
    return of_x, of_w


product.defvjp(_forward, _backward)


def grouped(x, w, group_sizes):
    """As `grouped_matmul`: every row times every expert, those of its own kept, with no loop whose length data decides."""
    ends = jnp.cumsum(group_sizes)
    rows = jnp.arange(len(x))[:, None]

    def add(out, each):
        mine, start, end = each
        return out + jnp.where((rows >= start) & (rows < end), product(x, mine), 0), None

    out = jnp.zeros((len(x), w.shape[-1]), x.dtype)
    return jax.lax.scan(add, out, (w, ends - group_sizes, ends))[0]


def declines(q, k, v, *, mask, scale=None, valid=None, backend: str | None = None, **more) -> str | None:
    """Why cuDNN does not take a call of `flash_attention`; None: it does. valid is not asked: sequences are full."""
    if (backend or jax.default_backend()) != "gpu":
        return "no GPU"
    if q.dtype not in (jnp.bfloat16, jnp.float16) or k.dtype != q.dtype or v.dtype != q.dtype:
        return f"dtypes {q.dtype}, {k.dtype}, {v.dtype}"
    if max(q.shape[-1], v.shape[-1]) > WIDEST:
        return f"head dims {q.shape[-1]} and {v.shape[-1]}"
    if not mask.causal or mask.apart:
        return f"{mask}"
    if q.shape[1] % 2 and _drawn(mask, more.get("chosen")):
        return f"an odd number of tokens, {q.shape[1]}, under {mask}"
    if asked := sorted(name for name, value in more.items() if value is not None and name not in ("chosen", "block")):
        return ", ".join(asked)
    return None


def _drawn(mask, chosen) -> bool:
    """Whether cuDNN wants the mask as numbers that it adds to logits: it knows causality and plain windows itself."""
    return chosen is not None or mask.sinks > 0 or mask.block > 1


def _attention(q, k, v, *, mask, scale, chosen=None, block=None, implementation="cudnn"):
    """As the reference; lse passes no gradient on, which nothing takes where one call sees all keys."""
    length = q.shape[1]
    window = None if mask.window is None or mask.window >= length else (mask.window - 1, 0)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    width = max(q.shape[-1], v.shape[-1])
    parts = (jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width + -width % 8 - x.shape[-1]))) for x in (q, k, v))
    how = {"is_causal": True, "local_window_size": window}
    if _drawn(mask, chosen):
        at = jnp.arange(length, dtype=jnp.int32)
        seen = mask(at[:, None], at[None, :])[None, None]  # [B or 1, heads or 1, Q, S]
        if chosen is not None:
            by_head = jnp.repeat(chosen, q.shape[2] // k.shape[2], axis=1)
            seen = seen & attention.chosen_slots(by_head, block, length)
        how = {"mask": seen}
    run = functools.partial(jax.nn.dot_product_attention, implementation=implementation)
    out, lse = run(*parts, scale=scale, return_residual=True, **how)
    return out[..., : v.shape[-1]], jax.lax.stop_gradient(lse.astype(jnp.float32)), None

"""grouped_matmul in plain JAX: this file defines it, kernels must match it.

Tokens sorted by expert, every run of tokens times its own expert's matrix (MegaBlocks, Gale et al. 2022,
arXiv:2211.15841; the rows and groups are those of `jax.lax.ragged_dot`).
"""

import functools

import jax
import jax.numpy as jnp

from optx.errors import OptxError
from optx.tensor import Tensor, is_qtensor, matmul_rows

BLOCK = 128  # rows of one product; decode takes fewer


def check(x, w, group_sizes) -> None:
    """Raises: OptxError where x [T, D], w [E, D, F] and group_sizes int[E] do not fit each other."""
    say = functools.partial("grouped_matmul: {} {}; needs {}".format)
    if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise OptxError(say("x", f"{x.dtype}{list(x.shape)}", "floating [T, D]"))
    if w.ndim != 3 or w.shape[1] != x.shape[1]:
        raise OptxError(say("w", list(w.shape), f"[E, D, F] with x's D = {x.shape[1]}"))
    if is_qtensor(w) and w.axis != -2:
        raise OptxError(say("w packed along axis", w.axis, "-2, the contracted one"))
    if group_sizes.shape != w.shape[:1] or not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        got = f"{group_sizes.dtype}{list(group_sizes.shape)}"
        raise OptxError(say("group_sizes", got, f"integers [E] with w's E = {w.shape[0]}"))


def grouped_matmul(x: jax.Array, w: Tensor, group_sizes: jax.Array) -> jax.Array:
    """out[t] = x[t] @ w[e(t)], where rows sum(group_sizes[:e]) .. sum(group_sizes[:e + 1]) belong to expert e.

    x [T, D] sorted by expert; w [E, D, F] dense or QTensor; group_sizes int32[E], sum at most T: rows past it give 0
    (of a larger sum only the first T rows count). -> [T, F] in x's dtype, accumulated in float32.
    Experts without rows are neither read nor dequantized. Differentiable in x and in a dense w.
    Raises: OptxError for shapes that do not fit.
    """
    check(x, w, group_sizes)
    return _product(x, w, group_sizes) if is_qtensor(w) else _differentiable(x, w, group_sizes)


@jax.custom_vjp
def _differentiable(x, w, group_sizes):
    """Its loops run as often as data says, which jax does not turn around itself."""
    return _product(x, w, group_sizes)


def _forward(x, w, group_sizes):
    return _product(x, w, group_sizes), (x, w, group_sizes)


def _backward(kept, slope):
    """dx[t] = dy[t] @ w[e(t)]^T, dw[e] = sum over e's rows of x[t]^T dy[t]."""
    x, w, group_sizes = kept
    ends = jnp.minimum(jnp.cumsum(jnp.maximum(group_sizes.astype(jnp.int32), 0)), x.shape[0])
    _, pull = jax.vjp(lambda w: jax.lax.ragged_dot(x, w.astype(x.dtype), jnp.diff(ends, prepend=0)), w)
    return _product(slope, jnp.swapaxes(w, 1, 2), group_sizes), *pull(slope), None


_differentiable.defvjp(_forward, _backward)


def _product(x, w, group_sizes):
    tokens, (experts, _, f) = x.shape[0], w.shape
    if not tokens or not experts:
        return jnp.zeros((tokens, f), x.dtype)
    size = min(BLOCK, max(8, 1 << (2 * tokens // experts).bit_length()))
    ends = jnp.minimum(jnp.cumsum(jnp.maximum(group_sizes.astype(jnp.int32), 0)), tokens)
    padded = jnp.pad(x, ((0, size), (0, 0)))
    inside = jnp.arange(size)[:, None]

    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
    (busy,) = jnp.nonzero(ends > starts, size=min(experts, tokens), fill_value=experts)

    def of_expert(i, out):
        expert = busy[i]
        start, end = starts[expert], ends[expert]
        product_of = _product_with(w, expert)

        def block(i, out):
            at = start + i * size
            y = product_of(jax.lax.dynamic_slice_in_dim(padded, at, size))
            before = jax.lax.dynamic_slice_in_dim(out, at, size)
            y = jnp.where(inside < end - at, y, before)
            return jax.lax.dynamic_update_slice_in_dim(out, y, at, axis=0)

        return jax.lax.fori_loop(0, -(-(end - start) // size), block, out)

    out = jnp.zeros((tokens + size, f), x.dtype)
    out = jax.lax.fori_loop(0, jnp.sum(ends > starts), of_expert, out)
    return out[:tokens]


def _product_with(w, expert):
    """y = x @ w[expert] as a function of x; a packed expert is dequantized once."""
    mine = jax.tree.map(lambda part: jax.lax.dynamic_index_in_dim(part, expert, keepdims=False), w)
    if is_qtensor(w):
        rows = mine.rows()
        return lambda x: matmul_rows(x, rows)
    return lambda x: jnp.matmul(x, mine.astype(x.dtype), preferred_element_type=jnp.float32).astype(x.dtype)

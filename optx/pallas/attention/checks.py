"""What ops ask of their arguments, whichever row runs: shapes and dtypes when traced, page tables in what
`checkified` traces (the engine's `debug` option). Elsewhere nothing is left of them: an effect of checkify, even an unused one,
takes a jitted function off the fast path of its calls (8 ms instead of 0.3 with 400 arguments)."""

import contextvars
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import checkify

from optx.errors import LoweringError

_values = contextvars.ContextVar("values are checked", default=False)


def checkified(function: Callable) -> Callable:
    """`checkify.checkify(function)` with the page tables of attention ops checked: -> (error, function's result)."""

    @functools.wraps(function)
    def traced(*args, **kwargs):
        before = _values.set(True)
        try:
            return function(*args, **kwargs)
        finally:
            _values.reset(before)

    return checkify.checkify(traced)


def _need(op: str, good: bool, argument: str, got, allowed: str) -> None:
    if not good:
        got = f"{got.dtype}{list(got.shape)}" if hasattr(got, "shape") else got
        raise LoweringError(f"{op}: {argument} is {got}; allowed: {allowed}")


def _floating(x) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def flash_attention(q, k, v, *, sink_logits=None, valid=None, segments=None, **_) -> None:
    op = "flash_attention"
    _need(op, q.ndim == 4 and _floating(q), "q", q, "floating [B, S, N, H]")
    b, s, n, h = q.shape
    _need(op, k.ndim == 4 and (*k.shape[:2], k.shape[3]) == (b, s, h), "k", k, f"[{b}, {s}, K, {h}]")
    _need(op, k.shape[2] > 0 and n % k.shape[2] == 0, "k", k, f"kv heads that divide {n} query heads")
    _need(op, v.ndim == 4 and v.shape[:3] == k.shape[:3], "v", v, f"{list(k.shape[:3])} and a head dim")
    _sinks(op, sink_logits, n)
    for name, x in (("valid", valid), ("segments", segments)):
        _need(op, x is None or x.shape == (b, s), name, x, f"[{b}, {s}]")


def paged_decode(q, k_pool, v_pool, *, q_positions, **kwargs) -> None:
    op = "paged_decode"
    _need(op, q.ndim == 4 and _floating(q), "q", q, "floating [B, Q, N, H]")
    _need(op, q_positions.shape == q.shape[:2], "q_positions", q_positions, f"int32{list(q.shape[:2])}")
    _paged(op, q, q.shape[0], k_pool, v_pool, **kwargs)


def ragged_paged_attention(q, k_pool, v_pool, *, ragged, **kwargs) -> None:
    op = "ragged_paged_attention"
    _need(op, q.ndim == 3 and _floating(q), "q", q, "floating [T, N, H]")
    _need(
        op,
        ragged.rows.shape == q.shape[:1],
        "ragged.rows",
        ragged.rows,
        f"int32{list(q.shape[:1])}, a row a token of q",
    )
    _paged(op, q, ragged.batch, k_pool, v_pool, **kwargs)


def rotate_append(q, k, v, pool, *, positions, writes, spec, **_) -> None:
    op = "rotate_append"
    _need(op, q.ndim == 3 and _floating(q), "q", q, "floating [T, N, H]")
    t, n, h = q.shape
    kv_heads, page = spec.streams[0].shape[0], pool["k"].shape[2]
    if k is None:
        _need(op, n > 2 * kv_heads, "q", q, f"[{t}, N + {2 * kv_heads}, {h}], all heads, without k and v")
    for name, x in (("k", k), ("v", v)):
        _need(op, x is k is None or (x is not None and x.shape == (t, kv_heads, h)), name, x, f"[{t}, {kv_heads}, {h}]")
        _need(op, pool[name].shape[1:] == (kv_heads, page, h), "pool", pool[name], f"[pages, {kv_heads}, P, {h}]")
    _need(op, positions.shape == (t,) and positions.dtype == jnp.int32, "positions", positions, f"int32[{t}]")
    good = writes.shape in ((t,), (kv_heads, t)) and writes.dtype == jnp.int32
    _need(op, good, "writes", writes, f"int32[{t}], or int32[{kv_heads}, {t}] by head")


def add_norm(x, y, weight, **_) -> None:
    op = "add_norm"
    _need(op, x.ndim > 0 and _floating(x), "x", x, "floating [T, D]")
    _need(op, y is None or y.shape == x.shape, "y", y, f"{list(x.shape)}, as x, or None")
    _need(op, weight.shape == x.shape[-1:], "weight", weight, f"{list(x.shape[-1:])}")


def gated_act(gate, up, **_) -> None:
    op = "gated_act"
    _need(op, gate.ndim > 0 and _floating(gate), "gate", gate, "floating [T, F]")
    if up is None:
        _need(op, gate.shape[-1] % 2 == 0, "gate", gate, "[T, 2F], gate and up, without up")
    _need(op, up is None or up.shape == gate.shape, "up", up, f"{list(gate.shape)}, as gate, or None")


def _paged(
    op, q, batch, k_pool, v_pool, *, positions, table, lengths, sink_logits=None, logit_scale=None, value_dim=None, **_
):
    n, h = q.shape[-2:]
    _need(op, len(k_pool.shape) == 4 and k_pool.shape[3] == h, "k_pool", k_pool, f"[pages, K, P, {h}]")
    pages, kv_heads, page, _ = k_pool.shape
    _need(op, kv_heads > 0 and n % kv_heads == 0, "k_pool", k_pool, f"kv heads that divide {n} query heads")
    if v_pool is None:
        _need(op, value_dim is not None and 0 < value_dim <= h, "value_dim", value_dim, f"1 to {h} without v_pool")
    else:
        _need(op, v_pool.shape[:3] == k_pool.shape[:3], "v_pool", v_pool, f"{list(k_pool.shape[:3])} and a head dim")
    _need(op, positions.shape == (pages, page), "positions", positions, f"int32[{pages}, {page}]")
    shape = f"int32[G, {batch}, pages], G = 1 or {kv_heads}"
    good = table.ndim == 3 and table.shape[1] == batch and table.shape[0] in (1, kv_heads)
    _need(op, good and jnp.issubdtype(table.dtype, jnp.integer), "table", table, shape)
    _need(op, lengths.shape == table.shape[:2], "lengths", lengths, f"int32{list(table.shape[:2])}")
    _sinks(op, sink_logits, n)
    if logit_scale is not None:
        got = logit_scale.shape
        good = (
            len(got) == 3 and (got[0], got[2]) == (pages, page) and got[1] % kv_heads == 0 < got[1] and n % got[1] == 0
        )
        _need(op, good, "logit_scale", logit_scale, f"[{pages}, a multiple of {kv_heads} that divides {n}, {page}]")
    _listed(op, table, lengths, pages, page)


def _sinks(op, sink_logits, heads):
    _need(op, sink_logits is None or sink_logits.shape == (heads,), "sink_logits", sink_logits, f"[{heads}]")


def _listed(op, table: jax.Array, lengths: jax.Array, pages: int, page: int) -> None:
    """Listed pages exist, and no row has more tokens than its list holds."""
    if not _values.get():
        return
    room = table.shape[2] * page
    _hold(f"{op}: lengths are {{low}} to {{high}}; allowed: 0 to {room}, what the table lists", lengths, room)
    used = jnp.arange(table.shape[2]) * page < lengths[..., None]
    message = f"{op}: the table lists pages {{low}} to {{high}}; allowed: 0 to {pages - 1}"
    _hold(message, jnp.where(used, table, 0), pages - 1)


def _hold(message: str, values: jax.Array, top: int) -> None:
    good = jnp.all((values >= 0) & (values <= top))
    checkify.check(good, message, low=jnp.min(values), high=jnp.max(values))

"""`flash_attention` on TPU: Pallas Mosaic, a grid over the pairs of query and key blocks that the mask lets meet.

The mask is static, so the pairs are listed when the call is traced: a block that no query sees costs no step, one that all
see is not masked. The query heads of a kv head share its block of keys. FlashAttention-2 (Dao 2023, arXiv:2307.08691);
the list of blocks is that of splash attention (jax.experimental.pallas.ops.tpu.splash_attention), which has no positions
that stay visible before a window and no logit that carries no value beside it. It has no gradient.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from optx.errors import LoweringError
from optx.pallas.attention.reference import Mask
from optx.pallas.tpu_common import LANES, VMEM, arch_reason, dtype_reason

ROWS = 1024  # query rows a step: the heads that share a block of keys times the queries of a block
KEYS = 512  # keys a step
WIDEST = 512  # of keys and values
SMEM = 384 << 10  # bytes of the list of pairs
ABSENT = -(2**31)  # the segment of keys that nobody sees


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How one call is cut. Both are powers of two."""

    queries: int  # a block
    keys: int  # a block


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is static in a call, shapes apart."""

    mask: Mask
    scale: float
    softcap: float | None
    tiles: Tiles
    shared: int  # query heads a step
    interpret: Any = False


def tiles_for(length: int, group: int) -> Tiles:
    """By the length of the sequences and the query heads a kv head."""
    rows = max(ROWS // min(group, ROWS // LANES), LANES)
    size = max(_power(length), 16)
    return Tiles(queries=min(rows, size), keys=min(KEYS, size))


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def supports(args: Mapping[str, Any], target: Any) -> str | None:
    """None, or why the kernel declines: reads head_dim and, where given, heads, kv_heads, value_dim, dtype (or cache)."""
    if reason := arch_reason(target):
        return reason
    if reason := dtype_reason(args.get("dtype") or getattr(args.get("cache"), "dtype", None)):
        return reason
    for width in (args["head_dim"], args.get("value_dim") or args["head_dim"]):
        if reason := _width_reason(width):
            return reason
    if "heads" in args and args["heads"] % args["kv_heads"]:
        return f"{args['heads']} query heads over {args['kv_heads']} kv heads; allowed: a multiple"
    return None


def _width_reason(width: int) -> str | None:
    if width % 8 or not 8 <= width <= WIDEST + LANES:
        return f"heads of {width} entries; allowed: multiples of 8 up to {WIDEST + LANES}"
    return None


def flash_attention(
    q,
    k,
    v,
    *,
    mask: Mask = Mask(),
    scale=None,
    softcap=None,
    sink_logits=None,
    valid=None,
    segments=None,
    tiles: Tiles | None = None,
    interpret=False,
):
    """Attention inside self-contained sequences, as `attention.reference.flash_attention`.

    q [B, S, N, H], k [B, S, K, H], v [B, S, K, Hv] in float32 or bfloat16; valid bool[B, S]; segments int32[B, S], above
    -2**31; sink_logits [N]. interpret: False, True, or pltpu.InterpretParams.
    -> (out [B, S, N, Hv], lse float32[B, S, N], None). Has no gradient.
    Raises: LoweringError naming the argument for shapes and dtypes that it does not take.
    """
    _check(q, k, v, sink_logits, valid, segments, tiles)
    length, n, h = q.shape[1:]
    group = n // k.shape[2]
    cut = tiles or tiles_for(length, group)
    plan = Plan(
        mask=mask,
        scale=float(1 / math.sqrt(h) if scale is None else scale),
        softcap=None if softcap is None else float(softcap),
        tiles=cut,
        shared=math.gcd(group, max(_power(ROWS // cut.queries), 1)),
        interpret=interpret,
    )
    if (size := pairs(mask, length, cut).nbytes) > SMEM:
        _refuse("q", f"of {length} tokens, {size} bytes of block pairs", f"{SMEM} bytes of scalar memory")
    out, lse = _call(q, k, v, sink_logits, valid, segments, plan=plan)
    return out, lse, None


def _refuse(argument, got, allowed):
    raise LoweringError(f"flash_attention (mosaic_tpu): {argument} is {got}; allowed: {allowed}")


def _check(q, k, v, sink_logits, valid, segments, cut):
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            _refuse(name, list(x.shape), "[B, S, heads, width]")
        if x.dtype not in (jnp.float32, jnp.bfloat16) or x.dtype != q.dtype:
            _refuse(f"{name}'s dtype", x.dtype, "float32 or bfloat16, the same for q, k and v")
    b, s, n, h = q.shape
    kv_heads, value_dim = v.shape[2:]
    if k.shape != (b, s, kv_heads, h) or v.shape[:2] != (b, s):
        got = f"{list(k.shape)}, {list(v.shape)}"
        _refuse("k, v", got, f"[{b}, {s}, K, {h}], [{b}, {s}, K, Hv] for q {list(q.shape)}")
    if min(b, s, kv_heads) < 1 or n % kv_heads:
        _refuse("q", list(q.shape), f"at least one token, and heads in groups for K = {kv_heads}")
    for name, width in (("q", h), ("v", value_dim)):
        if reason := _width_reason(width):
            _refuse(name, f"{list(q.shape if name == 'q' else v.shape)}", reason)
    if sink_logits is not None and sink_logits.shape != (n,):
        _refuse("sink_logits", list(sink_logits.shape), f"[{n}]")
    for name, x, kind in (("valid", valid, jnp.bool_), ("segments", segments, jnp.int32)):
        if x is not None and (x.shape != (b, s) or x.dtype != kind):
            _refuse(name, f"{x.dtype}{list(x.shape)}", f"{jnp.dtype(kind).name}[{b}, {s}]")
    if cut is not None and any(size < 16 or size & (size - 1) for size in (cut.queries, cut.keys)):
        _refuse("tiles", cut, "powers of two from 16")


QUERY, KEY, FLAGS = range(3)  # rows of the list of pairs
FIRST, LAST, WHOLE = 1, 2, 4  # flags: of the query block, and that every query sees every key


@functools.lru_cache(maxsize=64)
def pairs(mask: Mask, length: int, cut: Tiles) -> np.ndarray:
    """int32[3, pairs]: query block, key block, flags; key blocks ascend within a query block."""
    found = []
    key = np.arange(-(-length // cut.keys)) * cut.keys
    last_key = key + cut.keys - 1
    for block in range(-(-length // cut.queries)):
        low, high = block * cut.queries, min((block + 1) * cut.queries, length) - 1
        some = key <= high if mask.causal else np.ones(len(key), bool)
        whole = (last_key <= low if mask.causal else some) & (last_key < length)
        if mask.window is not None:
            some = some & ((last_key > low - mask.window) | (key < mask.sinks))
            whole = whole & ((key > high - mask.window) | (last_key < mask.sinks))
        listed = np.flatnonzero(some)
        flags = WHOLE * whole[listed] + FIRST * (listed == listed[0]) + LAST * (listed == listed[-1])
        found.append(np.stack([np.full(len(listed), block), listed, flags]))
    return np.concatenate(found, axis=1).astype(np.int32)


@functools.partial(jax.jit, static_argnames="plan")
def _call(q, k, v, sink_logits, valid, segments, *, plan: Plan):
    b, length, n, h = q.shape
    kv_heads, value = v.shape[2:]
    group, shared, cut = n // kv_heads, plan.shared, plan.tiles
    size = math.lcm(cut.queries, cut.keys)
    total = -(-length // size) * size

    def arrange(x):
        """[B, S, heads, width] -> [B, heads, S', width]"""
        return jnp.pad(jnp.moveaxis(x, 1, 2), ((0, 0), (0, 0), (0, total - length), (0, 0)))

    listed = pairs(plan.mask, length, cut)
    count = listed.shape[1]
    if valid is not None:
        v = jnp.where(valid[..., None, None], v, 0)  # what nobody sees may be NaN, and 0 * NaN is not 0
    operands = [arrange(q).reshape(b, n // shared, shared, total, h), arrange(k), arrange(v)]
    at = lambda field, i, pairs: pairs[field * count + i]  # noqa: E731
    heads_of_keys = lambda head: head * shared // group  # noqa: E731
    in_specs = [
        pl.BlockSpec((1, 1, shared, cut.queries, h), lambda b, n, i, pairs, *_: (b, n, 0, at(QUERY, i, pairs), 0)),
        pl.BlockSpec((1, 1, cut.keys, h), lambda b, n, i, pairs, *_: (b, heads_of_keys(n), at(KEY, i, pairs), 0)),
        pl.BlockSpec((1, 1, cut.keys, value), lambda b, n, i, pairs, *_: (b, heads_of_keys(n), at(KEY, i, pairs), 0)),
    ]
    scalars = [jnp.asarray(listed.ravel())]
    if sink_logits is not None:
        scalars.append(sink_logits.astype(jnp.float32))
    masked = valid is not None or segments is not None
    if masked:
        own = jnp.zeros((b, length), jnp.int32) if segments is None else segments
        keys = own if valid is None else jnp.where(valid, own, ABSENT)
        grow = lambda x, fill: jnp.pad(x, ((0, 0), (0, total - length)), constant_values=fill)  # noqa: E731
        own, keys = grow(own, 0), grow(keys, ABSENT)
        operands += [own[..., None], keys[:, None]]
        in_specs += [
            pl.BlockSpec((1, cut.queries, 1), lambda b, n, i, pairs, *_: (b, at(QUERY, i, pairs), 0)),
            pl.BlockSpec((1, 1, cut.keys), lambda b, n, i, pairs, *_: (b, 0, at(KEY, i, pairs))),
        ]
    rows = shared * cut.queries
    kernel = functools.partial(
        _kernel, plan=plan, count=count, length=length, masked=masked, sink=sink_logits is not None
    )
    out, lse = pl.pallas_call(
        kernel,
        out_shape=(
            jax.ShapeDtypeStruct((b, n // shared, shared, total, value), q.dtype),
            jax.ShapeDtypeStruct((b, n // shared, shared, total), jnp.float32),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(b, n // shared, count),
            in_specs=in_specs,
            out_specs=(
                pl.BlockSpec(
                    (1, 1, shared, cut.queries, value), lambda b, n, i, pairs, *_: (b, n, 0, at(QUERY, i, pairs), 0)
                ),
                pl.BlockSpec((1, 1, shared, cut.queries), lambda b, n, i, pairs, *_: (b, n, 0, at(QUERY, i, pairs))),
            ),
            scratch_shapes=[
                pltpu.VMEM((rows, LANES), jnp.float32),
                pltpu.VMEM((rows, LANES), jnp.float32),
                pltpu.VMEM((rows, value), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        interpret=plan.interpret,
        name="flash_attention",
    )(*scalars, *operands)
    out = jnp.moveaxis(out.reshape(b, n, total, value), 1, 2)
    return out[:, :length], jnp.moveaxis(lse.reshape(b, n, total), 1, 2)[:, :length]


def _kernel(pairs, *refs, plan: Plan, count: int, length: int, masked: bool, sink: bool):
    refs = list(refs)
    sink_ref = refs.pop(0) if sink else None
    q_ref, k_ref, v_ref = refs[:3]
    own_ref, keys_ref = refs[3:5] if masked else (None, None)
    out_ref, lse_ref, top_ref, total_ref, sum_ref = refs[-5:]
    head, step = pl.program_id(1), pl.program_id(2)
    shared, size = plan.shared, plan.tiles.queries
    rows, value = sum_ref.shape
    query, key, flags = (pairs[field * count + step] for field in (QUERY, KEY, FLAGS))

    @pl.when(flags & FIRST != 0)
    def _():
        for g in range(shared):
            top = sink_ref[head * shared + g] if sink else -jnp.inf
            top_ref[g * size : (g + 1) * size] = jnp.full((size, LANES), top, jnp.float32)
        total_ref[...] = jnp.full(total_ref.shape, 1.0 if sink else 0.0, jnp.float32)
        sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)

    def seen():
        """bool[rows, keys]"""
        row = jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0) & (size - 1)
        at = key * plan.tiles.keys + jax.lax.broadcasted_iota(jnp.int32, (1, plan.tiles.keys), 1)
        found = plan.mask(query * size + row, at) & (at < length)
        if masked:
            own = jnp.concatenate([own_ref[0]] * shared, axis=0)
            found = found & (own == keys_ref[0])
        return found

    def block(whole: bool):
        exact = jax.lax.Precision.HIGHEST if q_ref.dtype == jnp.float32 else None
        dot = functools.partial(jax.lax.dot_general, precision=exact, preferred_element_type=jnp.float32)
        q = q_ref[0, 0].reshape(rows, -1)
        logits = dot(q, k_ref[0, 0], (((1,), (1,)), ((), ()))) * plan.scale
        if plan.softcap is not None:
            logits = plan.softcap * jnp.tanh(logits / plan.softcap)
        if not whole:
            logits = jnp.where(seen(), logits, -jnp.inf)
        before = top_ref[...]
        top = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
        base = jnp.where(top == -jnp.inf, 0, top)
        weights = jnp.exp(logits - base[:, :1])
        decay = jnp.exp(before - base)
        top_ref[...] = top
        total_ref[...] = decay * total_ref[...] + jnp.sum(weights, axis=1, keepdims=True)
        added = dot(weights.astype(v_ref.dtype), v_ref[0, 0], (((1,), (0,)), ((), ())))
        sum_ref[...] = decay[:, :1] * sum_ref[...] + added

    if masked:
        block(whole=False)
    else:
        whole = flags & WHOLE != 0
        pl.when(whole)(lambda: block(whole=True))
        pl.when(jnp.logical_not(whole))(lambda: block(whole=False))

    @pl.when(flags & LAST != 0)
    def _():
        total = total_ref[...]
        some = total > 0
        out = sum_ref[...] / jnp.where(some, total, 1)[:, :1]
        out_ref[0, 0] = out.reshape(shared, size, value).astype(out_ref.dtype)
        lse = jnp.where(some, top_ref[...] + jnp.log(total), -jnp.inf)
        for g in range(shared):
            lse_ref[0, 0, g : g + 1] = lse[g * size : (g + 1) * size].T[:1]

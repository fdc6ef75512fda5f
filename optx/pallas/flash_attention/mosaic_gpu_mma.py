"""`flash_attention` by the matrix instructions of a warp (mma.sync), which every NVIDIA GPU since Ampere has.

A thread block is one warpgroup with 64 query rows, 16 a warp; keys and values come a block of 64 at a time, one ahead. P passes
through shared memory from the layout of results to that of left operands (FlashAttention-2, arXiv:2307.08691). Arguments, masks
and the gradient are shared with the Blackwell kernel. Never run on hardware so far.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from optx.pallas.attention.inner_sm100 import LOG2E, LOWEST
from optx.pallas.attention.reference import Mask
from optx.pallas.flash_attention.mosaic_gpu_sm100 import Call, attend, marks_of, seen_of, spans
from optx.pallas.flash_attention.mosaic_gpu_sm100 import supports as _shared
from optx.pallas.late import plgpu, utils

ROWS = 64  # query rows of a thread block
BLOCK = 64  # keys of a step
SLICE = 16  # keys whose operands are in registers at once
HEAD_DIMS = ((64, 64), (128, 128))  # wider ones do not leave room for the sums in registers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How one call is cut."""

    stages: int = 2  # steps whose keys and values are in flight
    tma: bool = True  # False: copies by cp.async, the only ones before Hopper
    interpreted: bool = False  # products by jnp.dot, as the interpreter knows no mma


def supports(args, target) -> str | None:
    """None, or why this kernel declines the call site. Reads head_dim, value_dim and dtype where they are given."""
    widths = (args["head_dim"], args.get("value_dim") or args["head_dim"])
    if widths not in HEAD_DIMS:
        return f"head dims (keys, values) {widths}; it has {', '.join(map(str, HEAD_DIMS))}"
    return _shared(args, target)


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
):
    """Attention inside self-contained sequences: `reference.flash_attention`, whose gradient it has too.

    q [B, S, N, H], k [B, S, K, H], v [B, S, K, H] in bfloat16 or float16, H 64 or 128; scale a number; valid bool[B, S];
    segments int32[B, S], above -2**31. -> (out [B, S, N, H], lse float32[B, S, N], None).
    Raises: LoweringError naming the argument for shapes and dtypes that it does not take.
    """
    static = {
        "mask": mask,
        "scale": scale,
        "softcap": softcap,
        "tiles": tiles or Tiles(tma=utils._infer_arch()[0] >= 9),
    }
    return attend(_run, "mma", HEAD_DIMS, static, q, k, v, sink_logits, valid, segments)


def logits_of(call: Call, scores):
    """Scores to what the softmax compares: in log2 once they are multiplied by `unit_of`."""
    if call.softcap is not None:
        return jnp.tanh(scores * (call.scale / call.softcap)) * call.softcap
    return scores if call.scale > 0 else scores * call.scale


def unit_of(call: Call) -> float:
    return LOG2E * (call.scale if call.softcap is None and call.scale > 0 else 1)


def _body(q, k, v, *refs, call: Call):
    tiles, refs = call.tiles, list(refs)
    marks = (refs.pop(0), refs.pop(0)) if call.marked else None
    sink = refs.pop(0) if call.sinks else None
    out, lse, k_smem, v_smem, p_smem, full = refs
    stages, width = tiles.stages, v.shape[-1]
    batch, head = lax.axis_index("batch"), lax.axis_index("head")
    row = lax.axis_index("tile") * ROWS
    kv_head, at, unit = lax.div(head, call.group), pl.ds(row, ROWS), unit_of(call)
    runs = spans(call, row, ROWS, BLOCK)
    first, steps = runs[0][0], runs[-1][1] - runs[0][0]
    sums_in, left = plgpu.Layout.MMA_ACC(q.dtype), plgpu.Layout.MMA_LHS(q.dtype)
    right, by_row, by_column = plgpu.Layout.MMA_RHS(q.dtype), sums_in.reduce(1), sums_in.reduce(0)
    load = lambda ref, layout: plgpu.load(ref, layout=layout, optimized=False)  # noqa: E731
    spread = lambda x, axis, to: plgpu.layout_cast(lax.broadcast_in_dim(x, to, (axis,)), sums_in)  # noqa: E731
    inside = {} if tiles.tma else {"oob_mode": plgpu.OOBFillMode.PROMISE_IN_BOUNDS}
    slices = range(0, BLOCK, SLICE)

    def product(acc, a, b):
        if tiles.interpreted:
            return acc + jnp.dot(a, b, preferred_element_type=jnp.float32)
        return plgpu.mma(acc, a, b)

    def fetch(slot, i):
        """Step i into a slot. By cp.async, whose copies are waited for by their number, there is always one more."""
        step = first + (i if tiles.tma else lax.max(lax.min(i, steps - 1), 0))
        keys = pl.ds(lax.min(step, k.shape[2] // BLOCK - 1) * BLOCK, BLOCK)
        for pool, smem in ((k, k_smem), (v, v_smem)):
            barrier = [full.at[slot]] if tiles.tma else []
            plgpu.copy_gmem_to_smem(pool.at[batch, kv_head, keys], smem.at[slot], *barrier, **inside)

    def fetch_next(slot, i):
        run = functools.partial(fetch, slot, i)
        pl.when(i < steps)(run) if tiles.tma else run()

    for i in range(stages):
        fetch_next(i, jnp.int32(i))
    mine = load(q.at[batch, head, at], left)
    shape = (ROWS, SLICE)

    def seen(step, c):
        # A slice of a step is a step of SLICE keys.
        slice_of = lax.div(step * BLOCK + c, SLICE)
        there = seen_of(call, row, slice_of, shape, sums_in)
        if call.marked:
            keys = marks[1].at[batch, pl.ds(step * BLOCK + c, SLICE)]
            there = there & (
                spread(load(marks[0].at[batch, at], by_row), 0, shape) == spread(load(keys, by_column), 1, shape)
            )
        return there

    def step(i, carry, masked: bool):
        largest, total, sums = carry
        slot = lax.rem(i, stages)
        if tiles.tma:
            plgpu.barrier_wait(full.at[slot])
        else:
            plgpu.wait_gmem_to_smem(2 * (stages - 1))
        logits, there = [], [seen(first + i, c) if masked else None for c in slices]
        for c, some in zip(slices, there, strict=True):
            zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), sums_in)
            part = logits_of(call, product(zeros, mine, load(k_smem.at[slot, pl.ds(c, SLICE)].T, right)))
            logits.append(jnp.where(some, part, LOWEST) if masked else part)
        top = functools.reduce(jnp.maximum, [largest, *(jnp.max(part, axis=1) for part in logits)])
        shrink = jnp.exp2((largest - top) * unit)
        total, sums = total * shrink, sums * spread(shrink, 0, sums.shape)
        base = spread(top * unit, 0, shape)
        for c, part, some in zip(slices, logits, there, strict=True):
            part = jnp.exp2(part * unit - base)
            part = jnp.where(some, part, 0.0) if masked else part
            total = total + jnp.sum(part, axis=1)
            p_smem[:, c : c + SLICE] = part.astype(q.dtype)
        for c in slices:
            weights = load(p_smem.at[:, pl.ds(c, SLICE)], left)
            sums = product(sums, weights, load(v_smem.at[slot, pl.ds(c, SLICE)], right))
        if tiles.tma:
            plgpu.commit_smem()  # what was read is read before the copy engine writes there
        fetch_next(slot, i + stages)
        return top, total, sums

    full_of = lambda x: plgpu.layout_cast(jnp.full((ROWS,), x, jnp.float32), by_row)  # noqa: E731
    start = (full_of(sink[head] * (LOG2E / unit)), full_of(1.0)) if call.sinks else (full_of(LOWEST), full_of(0.0))
    carry = (*start, plgpu.layout_cast(jnp.zeros((ROWS, width), jnp.float32), sums_in))
    for begin, end, masked in runs:
        carry = lax.fori_loop(begin - first, end - first, functools.partial(step, masked=masked), carry)
    if not tiles.tma:
        plgpu.wait_gmem_to_smem(0)
    largest, total, sums = carry
    some = total > 0
    lse.at[batch, head, at][...] = jnp.where(some, largest * (unit / LOG2E) + jnp.log(total), -jnp.inf)
    share = spread(1 / jnp.where(some, total, 1.0), 0, sums.shape)
    out.at[batch, head, at][...] = (sums * share).astype(q.dtype)


@functools.partial(jax.jit, static_argnums=0)
def _run(call: Call, q, k, v, sink_logits, valid, segments):
    """The kernel's call, alike for all layers of a model: assembled once. Heads go before tokens, in whole blocks of tokens."""
    b, s, n, h = q.shape
    whole = pl.cdiv(s, ROWS) * ROWS
    by_head = lambda x: jnp.pad(jnp.moveaxis(x, 2, 1), ((0, 0), (0, 0), (0, whole - s), (0, 0)))  # noqa: E731
    more = [*marks_of(call, valid, segments, whole)] if call.marked else []
    more += [sink_logits.astype(jnp.float32)] if call.sinks else []
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    block = plgpu.SMEM((call.tiles.stages, BLOCK, h), q.dtype, transforms=transforms)
    kernel = plgpu.kernel(
        functools.partial(_body, call=call),
        out_type=(jax.ShapeDtypeStruct((b, n, whole, h), q.dtype), jax.ShapeDtypeStruct((b, n, whole), jnp.float32)),
        grid=(whole // ROWS, n, b),
        grid_names=("tile", "head", "batch"),
        scratch_types=(
            block,
            block,
            plgpu.SMEM((ROWS, BLOCK), q.dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=call.tiles.stages),
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="flash_attention_mma",
    )
    out, lse = kernel(*(by_head(x) for x in (q, k, v)), *more)
    return jnp.moveaxis(out[:, :, :s], 1, 2), jnp.moveaxis(lse[:, :, :s], 1, 2)

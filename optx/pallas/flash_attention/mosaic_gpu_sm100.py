"""`flash_attention` for Blackwell: both products by tcgen05, scores, weights and sums in tensor memory.

A thread block takes 128 query rows a tile, two tiles of one head where tensor memory holds them (`inner_sm100`); one warp copies.
The gradient is the reference's. Never run on hardware so far.
"""

import dataclasses
import functools
import math
import types
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from optx.errors import LoweringError
from optx.pallas.attention import inner_sm100 as inner
from optx.pallas.attention import reference
from optx.pallas.attention.inner_sm100 import BLOCK, LOWEST, ROWS, SHARED
from optx.pallas.attention.reference import Mask
from optx.pallas.late import plgpu

HEAD_DIMS = ((64, 64), (128, 128), (192, 128), (256, 256))  # (query and key width, value width)
DTYPES = (jnp.bfloat16, jnp.float16)
REGISTERS = (
    216,
    72,
)  # of a thread of the softmax, and of the warps that copy and multiply: 3 x 168 of three warpgroups
NOT_REAL = -(2**31)  # the segment of keys that nobody sees


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How one call is cut."""

    tiles: int = 2  # of 128 query rows that a thread block has at once
    stages: int = 2  # steps whose keys and values are in flight
    interpreted: bool = False  # True: sequences are padded to whole tiles, as the interpreter does not clip copies


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """What is static in a call."""

    mask: Mask
    scale: float
    softcap: float | None
    tiles: Any  # Tiles, of the kernel that is called
    length: int  # S
    group: int  # query heads of a kv head
    marked: bool = False  # tokens have segments, or some are not real
    sinks: bool = False  # heads have a sink logit


def tiles_for(head_dim: int, value_dim: int) -> Tiles:
    tiles = 1 if value_dim > 128 else 2  # tensor memory holds S and O of each
    left = SHARED - tiles * ROWS * head_dim * 2
    return Tiles(tiles=tiles, stages=min(3, left // (2 * BLOCK * (head_dim + value_dim))))


def supports(args: Mapping[str, Any], target: Any) -> str | None:
    """None, or why this kernel declines the call site. Reads head_dim, value_dim, dtype and mask where they are given."""
    widths = (args["head_dim"], args.get("value_dim") or args["head_dim"])
    if widths not in HEAD_DIMS:
        return f"head dims (keys, values) {widths}; it has {', '.join(map(str, HEAD_DIMS))}"
    dtype = jnp.dtype(args.get("dtype") or "bfloat16")
    if dtype not in DTYPES:
        return f"activations in {dtype.name}; it has {', '.join(jnp.dtype(d).name for d in DTYPES)}"
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
):
    """Attention inside self-contained sequences: `reference.flash_attention`, whose gradient it has too.

    q [B, S, N, H], k [B, S, K, H], v [B, S, K, Hv] in bfloat16 or float16, (H, Hv) one of HEAD_DIMS; scale a number;
    valid bool[B, S]; segments int32[B, S], above -2**31. -> (out [B, S, N, Hv], lse float32[B, S, N], None).
    Raises: LoweringError naming the argument for shapes and dtypes that it does not take.
    """
    static = {"mask": mask, "scale": scale, "softcap": softcap, "tiles": tiles or tiles_for(q.shape[-1], v.shape[-1])}
    return attend(_run, "sm100", HEAD_DIMS, static, q, k, v, sink_logits, valid, segments)


def attend(run, name: str, head_dims, static: dict, q, k, v, sink_logits, valid, segments):
    """run(call, q, k, v, sink_logits, valid, segments) -> (out, lse) with checked arguments, and the reference's gradient."""
    if reason := _refusal(q, k, v, head_dims):
        raise LoweringError(f"flash_attention (mosaic_gpu/{name}): {reason}")
    scale, softcap = static["scale"], static["softcap"]
    call = Call(
        mask=static["mask"],
        scale=float(1 / math.sqrt(q.shape[-1]) if scale is None else scale),
        softcap=None if softcap is None else float(softcap),
        tiles=static["tiles"],
        length=q.shape[1],
        group=q.shape[2] // k.shape[2],
        marked=valid is not None or segments is not None,
        sinks=sink_logits is not None,
    )
    out, lse = _differentiable(run, call, q, k, v, sink_logits, valid, segments)
    return out, lse, None


def _refusal(q, k, v, head_dims) -> str | None:
    if q.ndim != 4 or q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        names = " and ".join(jnp.dtype(d).name for d in DTYPES)
        return f"q, k, v are {q.dtype}{q.shape}, {k.dtype}{k.shape}, {v.dtype}{v.shape}; allowed: [B, S, heads, width] in {names}"
    b, s, n, h = q.shape
    kv_heads, value_dim = v.shape[2:]
    if k.shape != (b, s, kv_heads, h) or v.shape[:2] != (b, s) or n % kv_heads or not s:
        return f"q {q.shape}, k {k.shape}, v {v.shape}; allowed: k [B, S, K, H] and v [B, S, K, Hv], K a divisor of the heads"
    if (h, value_dim) not in head_dims:
        return f"(H, Hv) is {(h, value_dim)}; allowed: {', '.join(map(str, head_dims))}"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _differentiable(run, call, q, k, v, sink_logits, valid, segments):
    return run(call, q, k, v, sink_logits, valid, segments)


def _forward(run, call, *args):
    return run(call, *args), args


def _backward(run, call, kept, cotangents):
    q, k, v, sink_logits, valid, segments = kept

    def defined(q, k, v, sink_logits):
        kwargs = {"mask": call.mask, "scale": call.scale, "softcap": call.softcap, "sink_logits": sink_logits}
        return reference.flash_attention(q, k, v, valid=valid, segments=segments, **kwargs)[:2]

    _, pull = jax.vjp(defined, q, k, v, sink_logits)
    return *pull(cotangents), None, None


_differentiable.defvjp(_forward, _backward)


def spans(call: Call, row: int, rows: int, block: int = BLOCK) -> list[tuple[Any, Any, bool]]:
    """(first step, step behind the last, masked) of the runs of steps that query rows row .. row + rows - 1 meet, in order:
    where masked is False every row sees every key. row may be traced."""
    mask, steps = call.mask, jnp.int32(pl.cdiv(call.length, block))
    last = lax.min(lax.div(row + rows + block - 1, block), steps) if mask.causal else steps
    oldest = lambda query: lax.max(mask.oldest(query), 0)  # noqa: E731
    first = jnp.int32(0) if mask.window is None or mask.sinks else lax.min(lax.div(oldest(row), block), last)
    if call.marked or mask.apart:
        return [(first, last, True)]
    whole = first
    if mask.window is not None:
        whole = lax.max(first, lax.min(lax.div(oldest(row + rows - 1) + block - 1, block), last))
    torn = lax.div(row + 1, block) if mask.causal else jnp.int32(call.length // block)
    torn = lax.max(whole, lax.min(torn, last))
    left = [] if mask.window is None else [(first, whole, True)]
    return [*left, (whole, torn, False), (torn, last, True)]


def seen_of(call: Call, start, step, shape, layout):
    """bool[rows, keys]: what the mask lets rows start .. see of the keys of a step, in a layout of registers."""
    mask, (_, block) = call.mask, shape
    iota = lambda axis: plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=layout)  # noqa: E731
    # Positions from the step's first key on, where the mask allows: columns are constants then.
    base = 0 if mask.sinks or mask.skip or mask.block > 1 else step * block
    key = step * block - base + iota(1)
    there = mask(start - base + iota(0), key)
    return there if mask.causal else there & (key < call.length - base)


def inner_of(call: Call, head_dim: int, value_dim: int) -> inner.Inner:
    tiles = call.tiles
    return inner.Inner(
        tiles=tiles.tiles,
        stages=tiles.stages,
        head_dim=head_dim,
        value_dim=value_dim,
        scale=call.scale,
        softcap=call.softcap,
        noted=call.marked,
        interpreted=tiles.interpreted,
    )


def _body(q, k, v, /, *refs, call: Call, **held):
    refs, held = list(refs), types.SimpleNamespace(**held)
    marks = (refs.pop(0), refs.pop(0)) if call.marked else None
    sink = refs.pop(0) if call.sinks else None
    out, lse = refs
    form = inner_of(call, q.shape[-1], out.shape[-1])
    wg, batch, head = lax.axis_index("wg"), lax.axis_index("batch"), lax.axis_index("head")
    rows = form.tiles * ROWS
    row = lax.axis_index("tile") * rows

    def reach():
        """(first step, number of steps, runs): made by each role, as what all share is spilled."""
        runs = spans(call, row, rows)
        return runs[0][0], runs[-1][1] - runs[0][0], runs

    def fetch():
        first, steps, _ = reach()
        kv_head = lax.div(head, call.group)
        for t in range(form.tiles):
            at = pl.ds(row + t * ROWS, ROWS)
            for c in range(form.strips):
                numbers = q.at[batch, at, head, pl.ds(c * form.strip, form.strip)]
                plgpu.copy_gmem_to_smem(numbers, held.q.at[t, c], held.loaded.at[t])

        def step(i, _):
            slot, keys = lax.rem(i, form.stages), pl.ds((first + i) * BLOCK, BLOCK)
            pl.when(i >= form.stages)(lambda: plgpu.barrier_wait(held.k_empty.at[slot]))
            plgpu.copy_gmem_to_smem(k.at[batch, keys, kv_head], held.k.at[slot], held.k_full.at[slot])
            pl.when(i >= form.stages)(lambda: plgpu.barrier_wait(held.v_empty.at[slot]))
            plgpu.copy_gmem_to_smem(v.at[batch, keys, kv_head], held.v.at[slot], held.v_full.at[slot])

        lax.fori_loop(0, steps, step, None)
        inner.drain(form.stages, steps, held.k_empty)
        inner.drain(form.stages, steps, held.v_empty)

    native = plgpu.Layout.TCGEN05_TMEM_NATIVE

    def softmax(t):
        first, _, runs = reach()
        start = row + t * ROWS
        at = pl.ds(start, ROWS)

        def seen(i, c, size):
            slice_of = (first + i) * (BLOCK // size) + c // size  # a slice of a step is a step of fewer keys
            there = seen_of(call, start, slice_of, (ROWS, size), native)
            if call.marked:
                mine = plgpu.load(marks[0].at[batch, at], layout=native.reduce(1), optimized=False)
                keys = marks[1].at[batch, pl.ds(slice_of * size, size)]
                theirs = plgpu.load(keys, layout=native.reduce(0), optimized=False)
                spread = lambda x, axis: lax.broadcast_in_dim(x, (ROWS, size), (axis,))  # noqa: E731
                there = there & (spread(mine, 0) == spread(theirs, 1))
            return there

        carry = (inner.full(LOWEST), inner.full(0.0))
        if call.sinks:
            carry = (inner.full(sink[head] * (inner.LOG2E / form.unit)), inner.full(1.0))
        runs = [(begin - first, end - first, masked) for begin, end, masked in runs]
        carry = inner.softmax(held, form, t, carry, runs, seen)
        inner.store(held, form, t, carry, out.at[batch, at, head], lse.at[batch, head, at])

    @pl.when(wg == 0)
    def _():
        plgpu.set_max_registers(REGISTERS[1], action="decrease")

        @plgpu.warp_map
        def _(warp):
            pl.when(warp == 0)(fetch)
            pl.when(warp == 1)(lambda: inner.multiply(held, form, reach()[1]))

    @pl.when(wg > 0)
    def _():
        plgpu.set_max_registers(REGISTERS[0], action="increase")
        softmax(wg - 1)


def marks_of(call: Call, valid, segments, rows: int):
    """int32[B, rows]: the segment of a query, and of a key that is real."""
    pad = lambda x, fill: jnp.pad(x, ((0, 0), (0, rows - x.shape[1])), constant_values=fill)  # noqa: E731
    some = valid if segments is None else segments
    mine = jnp.zeros(some.shape, jnp.int32) if segments is None else segments
    theirs = mine if valid is None else jnp.where(valid, mine, NOT_REAL)
    return pad(mine, 0), pad(theirs, NOT_REAL)


@functools.partial(jax.jit, static_argnums=0)
def _run(call: Call, q, k, v, sink_logits, valid, segments):
    """The kernel's call, alike for all layers of a model: assembled once."""
    count = call.tiles.tiles
    b, s, n, h = q.shape
    value_dim = v.shape[-1]
    row_tiles = pl.cdiv(s, count * ROWS)
    whole = row_tiles * count * ROWS
    padded = s + (whole - s if call.tiles.interpreted else -s % 8)  # copies of tiles want a multiple of 8 tokens
    q, k, v = (jnp.pad(x, ((0, 0), (0, padded - s), (0, 0), (0, 0))) for x in (q, k, v))
    more = [*marks_of(call, valid, segments, whole)] if call.marked else []
    more += [sink_logits.astype(jnp.float32)] if call.sinks else []

    kernel = plgpu.kernel(
        functools.partial(_body, call=call),
        out_type=(
            jax.ShapeDtypeStruct((b, padded, n, value_dim), q.dtype),
            jax.ShapeDtypeStruct((b, n, whole), jnp.float32),
        ),
        grid=(row_tiles, n, b),
        grid_names=("tile", "head", "batch"),
        num_threads=1 + count,
        thread_name="wg",
        scratch_types=inner.scratch(inner_of(call, h, value_dim), q.dtype),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="flash_attention_sm100",
    )
    out, lse = kernel(q, k, v, *more)
    return out[:, :s], jnp.moveaxis(lse[:, :, :s], 1, 2)

"""`flash_attention` for Blackwell: both products by tcgen05, scores, weights and sums in tensor memory.

A thread block takes 128 query rows a tile, two tiles of one head where tensor memory holds them. One warp copies, one issues the
products; a warpgroup a tile has the softmax, a row a thread, and puts its weights P over the scores S that they come from:

    keys, values --> S = Q K^T --scored--> softmax (O rescaled) --weighed--> O += P V --summed--> next S

Sums are rescaled only when a row's largest logit has grown by 2^GROWTH (FlashAttention-4, arXiv:2603.05451, section 3; its
polynomial exp2 and its correction warpgroup are left out). The gradient is the reference's. Never run on hardware so far.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from optx.errors import LoweringError
from optx.pallas.attention import reference
from optx.pallas.attention.reference import Mask
from optx.pallas.late import plgpu

ROWS = 128  # query rows of a tile: lanes of tensor memory
BLOCK = 128  # keys of a step
HEAD_DIMS = ((64, 64), (128, 128), (192, 128), (256, 256))  # (query and key width, value width)
DTYPES = (jnp.bfloat16, jnp.float16)
SHARED = 226 << 10  # bytes of a thread block, barriers apart
REGISTERS = (224, 64)  # of a thread of the softmax, and of the warps that copy and multiply
LOWEST = float(jnp.finfo(jnp.float32).min)
LOG2E = math.log2(math.e)
WIDE = 32  # columns of tensor memory that pass through registers at once
GROWTH = 8.0  # log2 of how large weights may become before sums are rescaled
NOT_REAL = -(2**31)  # the segment of keys that nobody sees


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How one call is cut."""

    tiles: int = 2  # of 128 query rows that a thread block has at once
    stages: int = 2  # steps whose keys and values are in flight
    # True: sequences are padded to whole tiles and P has columns of its own: the interpreter neither clips copies nor lets a
    # part of a union of refs live beside another part of it.
    interpreted: bool = False


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


def strip_of(head_dim: int) -> int:
    """Numbers of a query, and of a result, that are copied at once."""
    return math.gcd(head_dim, 128)


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


def logits_of(call: Call, scores):
    """Scores to what the softmax compares: in log2 once they are multiplied by `unit_of`."""
    if call.softcap is not None:
        return jnp.tanh(scores * (call.scale / call.softcap)) * call.softcap
    return scores if call.scale > 0 else scores * call.scale


def unit_of(call: Call) -> float:
    return LOG2E * (call.scale if call.softcap is None and call.scale > 0 else 1)


def _body(q, k, v, *refs, call: Call):
    count, stages = call.tiles.tiles, call.tiles.stages
    refs = list(refs)
    marks = (refs.pop(0), refs.pop(0)) if call.marked else None
    sink = refs.pop(0) if call.sinks else None
    out, lse, q_smem, k_smem, v_smem = (refs.pop(0) for _ in range(5))
    (scores, weights), sums = refs.pop(0), refs.pop(0)
    loaded, k_full, v_full, k_empty, v_empty, scored, weighed, summed, ended = refs
    wg, batch, head = lax.axis_index("wg"), lax.axis_index("batch"), lax.axis_index("head")
    rows = count * ROWS
    row = lax.axis_index("tile") * rows

    def reach():
        """(first step, number of steps, runs): made by each role, as what all share is spilled."""
        runs = spans(call, row, rows)
        return runs[0][0], runs[-1][1] - runs[0][0], runs

    strip, value_dim = strip_of(q.shape[-1]), out.shape[-1]
    strips = q.shape[-1] // strip
    score_of = lambda t: scores.at[:, pl.ds(t * BLOCK, BLOCK)]  # noqa: E731
    weight_of = lambda t, c, size: weights.at[:, pl.ds(t * 2 * BLOCK + c, size)]  # noqa: E731 - over the scores of t
    sum_of = lambda t, c, size: sums.at[:, pl.ds(t * value_dim + c, size)]  # noqa: E731

    def each_step(steps, visit):
        lax.fori_loop(0, steps, lambda i, _: visit(i, lax.rem(i, stages)), None)

    def drain(steps, barrier):
        await_ = lambda i, _: plgpu.barrier_wait(barrier.at[lax.rem(i, stages)])  # noqa: E731
        lax.fori_loop(lax.max(steps - stages, 0), steps, await_, None)

    def fetch():
        first, steps, _ = reach()
        kv_head = lax.div(head, call.group)
        for t in range(count):
            at = pl.ds(row + t * ROWS, ROWS)
            for c in range(strips):
                numbers = q.at[batch, at, head, pl.ds(c * strip, strip)]
                plgpu.copy_gmem_to_smem(numbers, q_smem.at[t, c], loaded.at[t])

        def step(i, slot):
            keys = pl.ds((first + i) * BLOCK, BLOCK)
            pl.when(i >= stages)(lambda: plgpu.barrier_wait(k_empty.at[slot]))
            plgpu.copy_gmem_to_smem(k.at[batch, keys, kv_head], k_smem.at[slot], k_full.at[slot])
            pl.when(i >= stages)(lambda: plgpu.barrier_wait(v_empty.at[slot]))
            plgpu.copy_gmem_to_smem(v.at[batch, keys, kv_head], v_smem.at[slot], v_full.at[slot])

        each_step(steps, step)
        drain(steps, k_empty)
        drain(steps, v_empty)

    def multiply():
        _, steps, _ = reach()

        def score(i, t):
            slot = lax.rem(i, stages)
            for c in range(strips):
                keys = k_smem.at[slot, :, pl.ds(c * strip, strip)].T
                done = [scored.at[t]] if c == strips - 1 else []
                plgpu.tcgen05_mma(score_of(t), q_smem.at[t, c], keys, *done, accumulate=c > 0)
            if t == count - 1:
                plgpu.tcgen05_commit_arrive(k_empty.at[slot])

        for t in range(count):
            plgpu.barrier_wait(loaded.at[t])

        @pl.when(steps > 0)
        def _():
            plgpu.barrier_wait(k_full.at[0])
            for t in range(count):
                score(0, t)

        def step(i, slot):
            plgpu.barrier_wait(v_full.at[slot])
            more = i + 1 < steps
            pl.when(more)(lambda: plgpu.barrier_wait(k_full.at[lax.rem(i + 1, stages)]))
            for t in range(count):
                plgpu.barrier_wait(weighed.at[t])
                left = weight_of(t, 0, BLOCK)
                plgpu.tcgen05_mma(sum_of(t, 0, value_dim), left, v_smem.at[slot], summed.at[t], accumulate=i > 0)
                if t == count - 1:
                    plgpu.tcgen05_commit_arrive(v_empty.at[slot])
                plgpu.barrier_wait(summed.at[t])  # S of the next step takes the place of this one's P
                pl.when(more)(functools.partial(score, i + 1, t))

        each_step(steps, step)
        for t in range(count):
            plgpu.tcgen05_commit_arrive(ended.at[t])

    native = plgpu.Layout.TCGEN05_TMEM_NATIVE
    by_row = native.reduce(1)

    unit = unit_of(call)

    def softmax(t):
        first, _, runs = reach()
        start = row + t * ROWS
        at = pl.ds(start, ROWS)

        def seen(step):
            there = seen_of(call, start, step, (ROWS, BLOCK), native)
            if call.marked:
                mine = plgpu.load(marks[0].at[batch, at], layout=by_row, optimized=False)
                keys = marks[1].at[batch, pl.ds(step * BLOCK, BLOCK)]
                theirs = plgpu.load(keys, layout=native.reduce(0), optimized=False)
                spread = lambda x, axis: lax.broadcast_in_dim(x, (ROWS, BLOCK), (axis,))  # noqa: E731
                there = there & (spread(mine, 0) == spread(theirs, 1))
            return there

        def step(i, carry, masked: bool):
            largest, total = carry
            plgpu.barrier_wait(scored.at[t])
            logits = logits_of(call, plgpu.async_load_tmem(score_of(t), layout=native))
            plgpu.wait_load_tmem()
            there = seen(first + i) if masked else None
            logits = jnp.where(there, logits, LOWEST) if masked else logits
            top = jnp.maximum(largest, jnp.max(logits, axis=1))
            grown = jnp.max((top - largest) * unit) > GROWTH  # of any row: all are rescaled then
            top = jnp.where(grown, top, largest)
            shrink = jnp.exp2((largest - top) * unit)

            @pl.when(grown & (i > 0))
            def _():
                for c in range(0, value_dim, WIDE):
                    part = sum_of(t, c, WIDE)
                    old = plgpu.async_load_tmem(part, layout=native)
                    plgpu.wait_load_tmem()
                    plgpu.async_store_tmem(part, old * lax.broadcast_in_dim(shrink, old.shape, (0,)))

            base, total = top * unit, total * shrink
            for c in range(0, BLOCK, WIDE):
                part = logits[:, c : c + WIDE] * unit
                part = jnp.exp2(part - lax.broadcast_in_dim(base, part.shape, (0,)))
                part = jnp.where(there[:, c : c + WIDE], part, 0.0) if masked else part
                total = total + jnp.sum(part, axis=1)
                plgpu.async_store_tmem(weight_of(t, c, WIDE), part.astype(q_smem.dtype))
            plgpu.commit_tmem()
            plgpu.barrier_arrive(weighed.at[t])
            return top, total

        full = lambda x: plgpu.layout_cast(jnp.full((ROWS,), x, jnp.float32), by_row)  # noqa: E731
        carry = (full(LOWEST), full(0.0))
        if call.sinks:
            carry = (full(sink[head] * (LOG2E / unit)), full(1.0))
        for begin, end, masked in runs:
            loop = functools.partial(step, masked=masked)
            carry = lax.fori_loop(begin - first, end - first, loop, carry)
        largest, total = carry
        plgpu.barrier_wait(ended.at[t])
        some = total > 0
        lse.at[batch, head, at][...] = jnp.where(some, largest * (unit / LOG2E) + jnp.log(total), -jnp.inf)
        part = 1 / jnp.where(some, total, 1.0)
        for c in range(0, value_dim, 64):  # through the place of Q, which is not read any more
            done = plgpu.async_load_tmem(sum_of(t, c, 64), layout=native)
            done = jnp.where(lax.broadcast_in_dim(some, done.shape, (0,)), done, 0.0)
            done = done * lax.broadcast_in_dim(part, done.shape, (0,))
            to = q_smem.at[t, c // strip, :, pl.ds(c % strip, 64)]
            to[...] = plgpu.layout_cast(done.astype(q_smem.dtype), native(8))
        plgpu.commit_smem()
        for c in range(value_dim // strip):
            plgpu.copy_smem_to_gmem(q_smem.at[t, c], out.at[batch, at, head, pl.ds(c * strip, strip)])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(wg == 0)
    def _():
        plgpu.set_max_registers(REGISTERS[1], action="decrease")

        @plgpu.warp_map
        def _(warp):
            pl.when(warp == 0)(fetch)
            pl.when(warp == 1)(multiply)

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
    count, stages = call.tiles.tiles, call.tiles.stages
    b, s, n, h = q.shape
    value_dim = v.shape[-1]
    row_tiles = pl.cdiv(s, count * ROWS)
    whole = row_tiles * count * ROWS
    padded = s + (whole - s if call.tiles.interpreted else -s % 8)  # copies of tiles want a multiple of 8 tokens
    q, k, v = (jnp.pad(x, ((0, 0), (0, padded - s), (0, 0), (0, 0))) for x in (q, k, v))
    more = [*marks_of(call, valid, segments, whole)] if call.marked else []
    more += [sink_logits.astype(jnp.float32)] if call.sinks else []

    def shared(*shape):
        return plgpu.SMEM(shape, q.dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))

    plain = lambda n: plgpu.Barrier(num_arrivals=1, num_barriers=n)  # noqa: E731
    tensor = lambda n: plgpu.Barrier(num_arrivals=1, num_barriers=n, orders_tensor_core=True)  # noqa: E731
    both = [plgpu.TMEM((ROWS, count * BLOCK), jnp.float32), plgpu.TMEM((ROWS, count * 2 * BLOCK), q.dtype, packed=True)]
    scratch = [
        shared(count, h // strip_of(h), ROWS, strip_of(h)),
        shared(stages, BLOCK, h),
        shared(stages, BLOCK, value_dim),
        both if call.tiles.interpreted else plgpu.RefUnion(*both),
        plgpu.TMEM((ROWS, count * value_dim), jnp.float32),
        plgpu.Barrier(num_arrivals=h // strip_of(h), num_barriers=count),
        plain(stages),
        plain(stages),
        tensor(stages),
        tensor(stages),
        *(tensor(count) for _ in range(4)),
    ]
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
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="flash_attention_sm100",
    )
    out, lse = kernel(q, k, v, *more)
    return out[:, :s], jnp.moveaxis(lse[:, :, :s], 1, 2)

"""chained_matmul on Hopper: all products of one token between two attentions in one kernel.

A product of one token lasts as long as its weights take from memory, and as a kernel of its own some five microseconds more:
to start, to fill the pipeline and to drain it. Here thread blocks stay, one an SM. In each the producer warpgroup fetches the
weights of all products one after the other into a ring of shared memory, as fast as there is room, and knows nothing of their
order; the other warpgroups wait for all blocks where a product needs all of the one before, make its row anew in every block,
and multiply. Memory is busy meanwhile with the next weights.

Blocks wait for each other, so all must be on the device at once: `supports` asks that it has an SM for each. `sync` is a word
that all add to (as cooperative groups of CUDA do): its top bit turns when the last has come, and the others are zero again. They
meet an even number of times, which leaves it zero for the next kernel.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from optx import tensor
from optx.errors import LoweringError
from optx.pallas.add_norm import mosaic_gpu_sm90 as add_norm
from optx.pallas.chained_matmul import threads
from optx.pallas.chained_matmul.threads import BLOCK, GATED, GIVEN, GROUP, NORMED, WARP, Product
from optx.pallas.gated_act import mosaic_gpu_sm90 as gated_act
from optx.pallas.late import dependent, fragmented, overlapping, plgpu, scalar, utils, vector
from optx.pallas.norm_matmul import mosaic_gpu_sm90 as single
from optx.pallas.quant_matmul import mosaic_gpu_sm90 as packed
from optx.pallas.quant_matmul import mosaic_gpu_sm90_fragments as fragments
from optx.pallas.threads_sm90 import Number, Threads

OP = "chained_matmul"
SMS = 132
SHARED = 227 << 10  # bytes that a block may have
STEP = 16 << 10  # bytes of weights of a step
PARTS = (1, 2, 3, 4, 6)  # that share out a product; they divide SMS
BARRIER = 15  # of the consumers; warpgroups have 1 to 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What the kernel is specialised on; hashable, a static argument."""

    products: tuple[Product, ...]
    norm: threads.Norm
    activation: str
    blocks: int  # of 64 contracted numbers in a step
    groups: int  # warpgroups that multiply
    stages: int = 1  # steps that are in shared memory or on their way
    flying: int = 2  # on their way: more of them keep all other loads waiting (measured)
    grid: int = SMS
    ahead: bool = False  # weights are asked for before the kernel before this one has ended

    @property
    def threads(self) -> int:
        """That multiply."""
        return self.groups * GROUP

    @property
    def scales(self) -> int:
        """Rows of scales that a step needs."""
        return max(max(1, self.blocks * BLOCK // product.group) for product in self.products)

    @property
    def grouped(self) -> bool:
        return any(product.grouped for product in self.products)

    def shared(self, stages: int) -> int:
        """Bytes of shared memory."""
        first = self.products[0]
        scale = self.scales * BLOCK * jnp.dtype(first.scale).itemsize if self.grouped else 0
        stage = self.blocks * BLOCK * BLOCK * first.bits // 8 + scale
        row = 2 * max(product.share for product in self.products) + 2 * self.norm.width
        return stages * stage + row + 4 * (2 * self.groups * BLOCK + self.norm.sums) + 4096


def _plan(weights, activation: str, eps: float, offset: float, norm_dtype: str) -> Plan | str:
    """For weights of o, gate and up, down and perhaps the next (dense, `QTensor` or `Fragments`, abstract will do), or why there
    is none."""
    products = []
    for w, kind in zip(weights, (GIVEN, NORMED, GATED, NORMED), strict=False):
        found = _product(w, kind)
        if isinstance(found, str):
            return found
        products.append(found)
    if len({(product.kind, product.scale, product.grouped) for product in products}) > 1:
        return "weights of several formats; allowed: one"
    width = products[0].width
    sized = {"tokens": 1, "width": width, "dtype": "bfloat16", "weight": norm_dtype}
    for blocks in (blocks for blocks in (8, 4, 2, 1) if blocks * BLOCK * BLOCK * products[0].bits // 8 <= STEP):
        parts = [_parts(product, blocks) for product in products]
        if None in parts:
            continue
        shared_out = tuple(dataclasses.replace(p, parts=n) for p, n in zip(products, parts, strict=True))
        spans = [p.group for p in shared_out if p.grouped]
        for groups in (4, 2, 1):
            units = 4 * blocks // groups
            whole = 4 * blocks % (groups * threads.ATOM[products[0].bits]) == 0
            if whole and all(units * 16 % span == 0 or span % (units * 16) == 0 for span in spans):
                norm = threads.Norm(eps=float(eps), offset=float(offset), added=True, most=groups * GROUP, **sized)
                plan = Plan(products=shared_out, norm=norm, activation=activation, blocks=blocks, groups=groups)
                empty, one = plan.shared(0), plan.shared(1)
                stages = min(16, (SHARED - empty) // (one - empty))
                if stages >= 3:
                    return dataclasses.replace(plan, stages=stages, flying=3 if products[0].kind == "bf16" else 2)
    return "depths do not divide into steps that thread blocks share out"


def _product(w, made: str) -> Product | str:
    if w.ndim != 2 or any(size % BLOCK for size in w.shape):
        return f"a weight {list(w.shape)}; allowed: D and F in multiples of {BLOCK}"
    d, f = w.shape
    sized = {"made": made, "depth": d, "strips": f // BLOCK, "parts": 1}
    if not tensor.is_packed(w):
        return Product(kind="bf16", group=d, scale="bfloat16", **sized)
    if w.zero is not None:
        return f"{w.format} with zero points; allowed: symmetric"
    groups = (
        w.groups if isinstance(w, fragments.Fragments) else w.length // (getattr(w.format, "group", None) or w.length)
    )
    kind = {"Int": f"int{getattr(w.format, 'width', 0)}", "Float8": "fp8"}.get(type(w.format).__name__)
    if kind not in ("int4", "int8", "fp8") or d // groups % BLOCK:
        return f"a weight in {w.format}; allowed: bf16, int4, int8, fp8_e4m3, groups in multiples of {BLOCK}"
    return Product(kind=kind, group=d // groups, scale=str(w.scale.dtype), **sized)


def _parts(product: Product, blocks: int) -> int | None:
    """Into how many parts the contracted axis is cut, so that the busiest block has the least to do."""
    found = [n for n in PARTS if product.depth % (n * blocks * BLOCK) == 0]
    return min(found, key=lambda n: -(-product.strips * n // SMS) / n + 0.01 * n, default=None)


def _sums():
    """Layout of two numbers a thread."""
    return plgpu.Layout.WG_STRIDED((2 * GROUP,), 2)


class Consumers(Threads):
    """The threads that multiply, the first of their block."""

    def __init__(self, block, count: int):
        super().__init__(block)
        self._count = count

    def barrier(self):
        utils.inline_ptx(f"bar.sync {BARRIER}, {self._count};", has_side_effects=True, convergent=True)

    def meet(self, ref, blocks: int, turn: int, stay: bool = True):
        """All blocks have come here for the `turn`-th time, and what the first warp of each has stored in global memory is seen
        by all that stay for it."""
        with self.when(self.thread() < WARP):
            utils.warp_barrier()
            with self.when(self.thread() < 1):
                own = self.where(self.block() < 1, Number(self.block().like(-(1 << 31) + 1 - blocks)), 1)
                at = self._pointer(ref, self.wide(self.thread() & 0))
                utils.inline_ptx("red.release.gpu.global.add.u32 [$0], $1;", at, own.value, has_side_effects=True)
                if stay:
                    waits = "lt" if turn % 2 else "ge"
                    ptx = "{ .reg .pred p; .reg .b32 now; WAIT: ld.acquire.gpu.global.u32 now, [$0]; "
                    ptx += f"setp.{waits}.s32 p, now, 0; @p bra WAIT; }}"
                    utils.inline_ptx(ptx, at, has_side_effects=True)
        if stay:
            self.barrier()


def _threads(plan: Plan, refs, body, *, block, numbers=(), totals=None):
    """body(machine, refs, numbers[, totals]) by each thread that multiplies. refs: None stays None; numbers: i32, the same for
    all; totals: two float32 a thread, of which it returns new ones."""
    there = [ref for ref in refs if ref is not None]
    more = (_sums(),) if totals is not None else ()
    result = plgpu.ShapeDtypeStruct((2 * GROUP,), jnp.float32, _sums()) if totals is not None else ()
    kinds = tuple(plgpu.RefType(transforms) for ref, transforms in there)
    values = [jnp.asarray(x, jnp.int32) for x in (block, *numbers)]

    @plgpu.inline_mgpu(arg_types=(*kinds, *(scalar() for _ in values), *more), return_type=result)
    def run(_, *args):
        found = iter(args[: len(there)])
        given = [None if ref is None else next(found) for ref in refs]
        block, *numbers = (Number(x.registers.item()) for x in args[len(there) : len(there) + len(values)])
        machine = Consumers(block.value, plan.threads)
        if totals is None:
            body(machine, given, numbers)
            return ()
        pair = args[-1].registers.item()
        sums = body(machine, given, numbers, [Number(vector.extract(pair, [], [i])) for i in range(2)])
        pair = vector.from_elements(pair.type, [x.value for x in sums])
        return fragmented.FragmentedArray(
            _registers=np.array([pair], dtype=object), _layout=args[-1].layout, _is_signed=None
        )

    return run(*(ref for ref, _ in there), *values, *(() if totals is None else (totals,)))


def _body(*refs, plan: Plan):
    refs = list(refs)
    take = lambda n: [refs.pop(0) for _ in range(n)]  # noqa: E731
    products = plan.products
    (row, x), weights = take(2), take(sum(product.made == NORMED for product in products))
    ws = [take(1 if product.kind == "bf16" else 2) for product in products]
    (sync, stream, out), found = take(3), take(len(products) - (products[-1].parts == 1))
    found = [*found, out][: len(products)]
    w_smem, s_smem, row_smem, kept, sums, shared, full, empty = refs
    wg, block = lax.axis_index("wg"), lax.axis_index("block")
    plain = lambda ref: None if ref is None else (ref, ())  # noqa: E731

    def shares(product: Product):
        """(items of this block, steps of an item, the part that all of them are)."""
        items = product.strips * product.parts
        mine = lax.div(items - block + (plan.grid - 1), plan.grid)
        return mine, product.share // (plan.blocks * BLOCK), lax.rem(block, product.parts)

    @pl.when(wg == plan.groups)
    def _():
        begun = 0
        for product, w in zip(products, ws, strict=True):
            mine, steps, part = shares(product)

            def load(n, _, product=product, w=w, begun=begun, steps=steps, part=part):
                at, slot = begun + n, lax.rem(begun + n, plan.stages)
                pl.when(at >= plan.stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
                landed = lax.rem(at + plan.stages - plan.flying, plan.stages)
                pl.when(at >= plan.flying)(lambda: plgpu.barrier_wait(full.at[landed]))
                strip = lax.div(block + lax.div(n, steps) * plan.grid, product.parts)
                step = part * steps + lax.rem(n, steps)
                if product.kind == "bf16":
                    size = plan.blocks * BLOCK
                    of = w[0].at[pl.ds(step * size, size), pl.ds(strip * BLOCK, BLOCK)]
                else:
                    size = plan.blocks * product.bits // 2
                    of = w[0].at[strip, pl.ds(step * size, size)]
                plgpu.copy_gmem_to_smem(of, w_smem.at[slot], full.at[slot])
                if product.grouped:
                    count, first = _scales(plan, product), lax.div(step * (plan.blocks * BLOCK), product.group)
                    of = w[1].at[strip, pl.ds(first, count)]
                    plgpu.copy_gmem_to_smem(of, s_smem.at[slot, pl.ds(0, count)], full.at[slot])

            lax.fori_loop(0, mine * steps, load, None)
            begun = begun + mine * steps

        def drain(step, _):  # every arrival is awaited: barriers end in a known phase
            plgpu.barrier_wait(empty.at[lax.rem(step, plan.stages)])

        lax.fori_loop(jnp.maximum(begun - plan.stages, 0), begun, drain, None)

    @pl.when(wg < plan.groups)
    def _():
        if plan.ahead:
            plgpu.griddepcontrol_wait()
        begun, norms = 0, 0
        for i, product in enumerate(products):
            mine, steps, part = shares(product)
            source = {GIVEN: row, NORMED: kept if norms else x, GATED: None}[product.made]
            weight = weights[norms] if product.made == NORMED else None
            norms += product.made == NORMED
            last = norms == len(weights)
            before, y = (products[i - 1], found[i - 1]) if i else (None, None)

            def make(m, refs, numbers, i=i, product=product, before=before):
                source, y, weight, out, row, kept, sums, sync = refs
                meet = lambda: m.meet(sync, plan.grid, i - 1)  # noqa: E731
                if product.made == GIVEN:
                    threads.give(m, product, plan.threads, source, row, *numbers)
                elif product.made == GATED:
                    meet()
                    threads.gate(m, product, plan.threads, before, plan.activation, y, row, *numbers)
                else:
                    x = kept if source is None else source
                    threads.norm(m, plan.norm, product, before, x, kept, y, weight, out, row, sums, *numbers, meet)
                m.barrier()

            made = (source if source is not kept else None, y, weight, stream if last else None)
            _threads(plan, [*map(plain, (*made, row_smem, kept, sums, sync))], make, block=block, numbers=(part,))

            def item(t, _, product=product, begun=begun, steps=steps, part=part, scale=ws[i][-1], out=found[i]):
                def step(k, totals):
                    slot = lax.rem(begun + t * steps + k, plan.stages)
                    plgpu.barrier_wait(full.at[slot])
                    w = (w_smem.at[slot], _tiled() if product.kind == "bf16" else ())
                    scales = (s_smem.at[slot], ()) if product.grouped else None

                    def multiply(m, refs, numbers, totals):
                        w, scales, row = refs
                        return threads.multiply(m, product, plan.groups, plan.blocks, w, scales, row, *numbers, totals)

                    start = k * (plan.blocks * BLOCK)
                    refs = [w, scales, plain(row_smem)]
                    totals = _threads(plan, refs, multiply, block=block, numbers=(start,), totals=totals)
                    plgpu.barrier_arrive(empty.at[slot])
                    return totals

                totals = plgpu.layout_cast(jnp.zeros((2 * GROUP,), jnp.float32), _sums())
                totals = lax.fori_loop(0, steps, step, totals)

                def finish(m, refs, numbers, totals):
                    shared, scale, out = refs
                    turn, strip, part = numbers
                    threads.share(m, totals, shared, turn, plan.groups)
                    m.barrier()
                    with m.when(m.thread() < 32):
                        threads.collect(m, product, plan.groups, shared, turn, scale, out, strip, part)
                    return totals

                strip = lax.div(block + t * plan.grid, product.parts)
                numbers = (lax.rem(t, 2), strip, part)
                refs = [plain(shared), plain(scale) if product.scaled else None, plain(out)]
                _threads(plan, refs, finish, block=block, numbers=numbers, totals=totals)

            lax.fori_loop(0, mine, item, None)
            begun = begun + mine * steps

        turns = len(products) - 1

        def end(m, refs, _):
            found, out, sync = refs
            if products[-1].parts > 1:
                m.meet(sync, plan.grid, turns)
                threads.total(m, products[-1], plan.grid, found, out)
            if (turns + (products[-1].parts > 1)) % 2:  # its top bit is left as it was
                m.meet(sync, plan.grid, 0, stay=False)

        _threads(plan, [*map(plain, (found[-1], out, sync))], end, block=block)


def _scales(plan: Plan, product: Product) -> int:
    """Scales of an output in a step."""
    return max(1, plan.blocks * BLOCK // product.group)


def _tiled():
    return plgpu.TilingTransform((8, BLOCK)), plgpu.SwizzleTransform(128)


@functools.partial(jax.jit, static_argnames="plan")
def _run(row, x, weights, ws, sync, *, plan: Plan):
    """row [1, D'], x [1, D], norms' weights, parts of each product's weight, sync int32[1] -> (stream, product, sync)."""
    first, last = plan.products[0], plan.products[-1]
    partial = [
        jax.ShapeDtypeStruct((product.parts, product.width), jnp.dtype(product.stored))
        for product in (plan.products if last.parts > 1 else plan.products[:-1])
    ]
    dense, step = first.kind == "bf16", plan.blocks * BLOCK
    sync = jax.new_ref(sync)
    stream, out, *_ = dependent(
        functools.partial(_body, plan=plan),
        waits=plan.ahead,
        out_type=(
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((1, last.width), x.dtype),
            *partial,
        ),
        grid=(plan.grid,),
        grid_names=("block",),
        num_threads=plan.groups + 1,
        thread_name="wg",
        scratch_types=(
            plgpu.SMEM((plan.stages, step, BLOCK), x.dtype, transforms=_tiled())
            if dense
            else plgpu.SMEM((plan.stages, plan.blocks * first.bits // 2, fragments.WORDS), jnp.int32),
            plgpu.SMEM((plan.stages, plan.scales, BLOCK) if plan.grouped else (1, 1, BLOCK), jnp.dtype(first.scale)),
            plgpu.SMEM((max(product.share for product in plan.products),), x.dtype),
            plgpu.SMEM((plan.norm.width,), x.dtype),
            plgpu.SMEM((plan.norm.sums,), jnp.float32),
            plgpu.SMEM((2 * plan.groups * BLOCK,), jnp.float32),
            plgpu.Barrier(num_arrivals=1 + plan.grouped, num_barriers=plan.stages),
            plgpu.Barrier(num_arrivals=plan.groups, num_barriers=plan.stages),
        ),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
        kernel_name=OP,
    )(row, x, *weights, *(part for parts in ws for part in parts), sync)
    return stream, out, jax.freeze(sync)


def chained_matmul(
    row, x, weight, o, gate_up, down, following=None, sync=None, *, activation: str, eps: float, offset: float = 0.0
):
    """As the reference, for bfloat16; of more tokens than one by a kernel for each product, to the same roundings.

    Raises: LoweringError for what `supports` declines.
    """
    weights = [weight] if following is None else [weight, following[0]]
    ws = [o, gate_up, down, *(() if following is None else (following[1],))]
    kwargs = {"eps": eps, "offset": offset}
    if math.prod(x.shape[:-1]) != 1:
        s, both = single.norm_matmul(x, single.product(row, o), weight, gate_up, **kwargs)
        y = single.product(gated_act.gated_act(both, None, activation=activation), down)
        s, y = (s, y) if following is None else single.norm_matmul(s, y, *following, **kwargs)
        return s, y, sync
    ahead = overlapping() and not any(isinstance(w, tensor.QTensor) for w in ws)
    ws = [fragments.relayout(w) if isinstance(w, tensor.QTensor) else w for w in ws]
    plan = _plan(ws, activation, eps, offset, str(weight.dtype))
    if isinstance(plan, str):
        raise LoweringError(f"{OP}: {plan}")
    parts = [w.parts if isinstance(w, fragments.Fragments) else (w,) for w in ws]
    sync = jnp.zeros(1, jnp.int32) if sync is None else sync
    s, y, sync = _run(
        row.reshape(1, -1), x.reshape(1, -1), weights, parts, sync, plan=dataclasses.replace(plan, ahead=ahead)
    )
    return s.reshape(x.shape), y.reshape(*x.shape[:-1], -1), sync


def takes(weights, *, norm: str, activation: str, eps: float, offset: float) -> bool:
    """Whether one kernel multiplies by all of these weights, whose target `supports` has seen; norm: dtype of norms' weights."""
    return isinstance(_plan(weights, activation, eps, offset, norm), Plan)


def supports(args, target) -> str | None:
    """args: weights, those of o, gate and up, down and, if it follows, of the next product; norm: dtype of the norms' weights;
    eps, offset, activation, dtype of the activations, activations (a format they are rounded to)."""
    if (target.platform, target.arch) != ("gpu", "sm90"):
        return f"is for gpu sm90, not {target.platform} {target.arch}"
    if args.get("activations") is not None:
        return f"activations in {args['activations']}; allowed: as they are"
    for w in args["weights"]:
        if tensor.is_packed(w) and (reason := packed.supports({"weight": w, "dtype": args["dtype"]}, target)):
            return reason
    width = args["weights"][0].shape[1]
    reason = add_norm._reason(width, args["dtype"], [args["norm"]])
    reason = reason or gated_act._reason(args["weights"][2].shape[0], args["dtype"], args["activation"])
    if reason or args["dtype"] != "bfloat16":
        return reason or f"activations of {args['dtype']}; allowed: bfloat16"
    here = [device.core_count for device in jax.devices() if device.platform == "gpu"]
    if any(cores < SMS for cores in here):
        return f"{min(here)} multiprocessors; its thread blocks wait for each other and need {SMS}"
    plan = _plan(args["weights"], args["activation"], args["eps"], args["offset"], args["norm"])
    return plan if isinstance(plan, str) else None

"""A ring of shared-memory stages between one loading warpgroup and several computing ones.

Pallas arrives at a barrier with all 128 threads of a warpgroup, once a copy; small steps of several copies then wait for
barriers more than for memory. Here one thread announces all bytes of a step, and one lane a warp gives a stage back. The
interpreter, which knows no inlined operations, gets the same ring made of Pallas's own barriers.
"""

import dataclasses
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, nvvm

SCALAR = plgpu.Layout.WG_SPLAT(())
WARPS = 4  # of a warpgroup


@dataclasses.dataclass(frozen=True, kw_only=True)
class Copy:
    """One copy of a step: source[starts : starts + sizes] to a place in shared memory.

    sizes: 0 takes a single index and drops the axis. tiling: of the last axes.
    """

    source: object
    starts: tuple
    sizes: tuple[int, ...]
    to: object
    tiling: tuple[int, ...] = ()
    swizzle: int | None = None

    @property
    def bytes(self) -> int:
        return math.prod(n or 1 for n in self.sizes) * self.source.dtype.itemsize


def scratch(stages: int, readers: int, copies: int, interpreted: bool):
    """Shared memory of a `Ring`; copies: of a step, all steps alike."""
    if interpreted:
        full = plgpu.Barrier(num_arrivals=copies, num_barriers=stages)
        return (full, plgpu.Barrier(num_arrivals=readers, num_barriers=stages))
    return (plgpu.SMEM((2 * stages, 2), jnp.int32),)  # 64-bit words


class Ring:
    """Steps are numbered through; a step's stage is its number modulo `stages`. Made by all threads of a block."""

    def __init__(self, scratch, *, stages: int, readers: int):
        self.stages, self.interpreted = stages, len(scratch) == 2
        self.marks = scratch if self.interpreted else scratch[0]
        if not self.interpreted:
            self._start(readers)

    def _start(self, readers):
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=())
        def start(_, marks):
            i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
            first = utils.single_thread_predicate(utils.ThreadSubset.BLOCK)
            for i in range(2 * self.stages):
                count = 1 if i < self.stages else WARPS * readers
                at = utils.getelementptr(utils.memref_ptr(marks), [i], i64)
                nvvm.mbarrier_init(at, utils.c(count, i32), predicate=first)
            nvvm.fence_mbarrier_init()
            gpu.barrier()
            return ()

        start(self.marks)

    def stage(self, step):
        return lax.rem(step, self.stages)

    def _wait(self, which, step, lap):
        """which: 0 until loaded, 1 until free; lap: round of the ring whose end is awaited."""
        if self.interpreted:
            plgpu.barrier_wait(self.marks[which].at[self.stage(step)])
            return

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SCALAR), return_type=())
        def wait(_, mark, parity):
            i32 = ir.IntegerType.get_signless(32)
            parity = arith.trunci(ir.IntegerType.get_signless(1), parity.registers.flat[0])
            utils.BarrierRef(utils.memref_ptr(mark), utils.c(0, i32), None, 1).wait_parity(parity)
            return ()

        wait(self.marks.at[which * self.stages + self.stage(step)], lax.rem(lap, 2))

    def wait_loaded(self, step):
        self._wait(0, step, lax.div(step, self.stages))

    def wait_free(self, step):
        @pl.when(step >= self.stages)
        def _():
            self._wait(1, step, lax.div(step, self.stages) - 1)

    def free(self, step):
        """By a computing warpgroup: it reads the step no more."""
        if self.interpreted:
            plgpu.barrier_arrive(self.marks[1].at[self.stage(step)])
            return

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=())
        def free(_, mark):
            i32 = ir.IntegerType.get_signless(32)
            utils.warp_barrier()
            one = utils.single_thread_predicate(utils.ThreadSubset.WARP)
            utils.BarrierRef(utils.memref_ptr(mark), utils.c(0, i32), None, 1).arrive(predicate=one)
            return ()

        free(self.marks.at[self.stages + self.stage(step)])

    def load(self, step, copies):
        if self.interpreted:
            for copy in copies:
                at = [pl.ds(start, size) if size else start for start, size in zip(copy.starts, copy.sizes)]
                plgpu.copy_gmem_to_smem(copy.source.at[*at], copy.to, self.marks[0].at[self.stage(step)])
            return
        types, args = [plgpu.RefType()], [self.marks.at[self.stage(step)]]
        for copy in copies:
            transforms = (plgpu.TilingTransform(copy.tiling),) if copy.tiling else ()
            transforms += (plgpu.SwizzleTransform(copy.swizzle),) if copy.swizzle else ()
            starts = [jnp.int32(start) for start in copy.starts]
            types += [plgpu.RefType(), plgpu.RefType(transforms), *(SCALAR for _ in starts)]
            args += [copy.source, copy.to, *starts]

        @plgpu.inline_mgpu(arg_types=tuple(types), return_type=())
        def load(launch, mark, *flat):
            i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()
            barrier = utils.BarrierRef(utils.memref_ptr(mark), utils.c(0, i32), None, 1)
            flat = list(flat)
            with utils.single_thread(utils.ThreadSubset.WARPGROUP):
                barrier.arrive_expect_tx(sum(copy.bytes for copy in copies))
                for copy in copies:
                    source, to = flat.pop(0), flat.pop(0)
                    starts = [arith.index_cast(index, flat.pop(0).registers.flat[0]) for _ in copy.starts]
                    at = tuple(utils.ds(start, n) if n else start for start, n in zip(starts, copy.sizes, strict=True))
                    change = (mgpu.TileTransform(copy.tiling),) if copy.tiling else ()
                    launch.async_copy(
                        src_ref=source,
                        dst_ref=to,
                        gmem_slice=at,
                        gmem_transform=change,
                        swizzle=copy.swizzle,
                        barrier=barrier,
                        arrive=False,
                        predicate=None,
                    )
            return ()

        load(*args)

    def drain(self, total):
        """By the loading warpgroup at the end: Pallas wants its barriers in a known phase."""
        if self.interpreted:

            def one(step, _):
                plgpu.barrier_wait(self.marks[1].at[self.stage(step)])

            lax.fori_loop(jnp.maximum(total - self.stages, 0), total, one, None)

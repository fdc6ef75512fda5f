"""One row of x that a product on Hopper makes itself: norm(x + y), or act(gate) * up.

A kernel of its own for it takes two microseconds, most of them to start and to end. Here the warpgroup that fetches weights
asks for the first of them and then works like a block of `add_norm` or `gated_act`, to the same bits, while memory is busy.
The row stays in shared memory, from where each step gets its numbers. Every thread block makes what it multiplies; for a norm
it sums all of the row.
"""

import dataclasses

import jax

from optx.pallas.add_norm import mosaic_gpu_sm90 as add_norm
from optx.pallas.add_norm import reference as norms
from optx.pallas.gated_act import mosaic_gpu_sm90 as gated_act
from optx.pallas.gated_act import reference as acts
from optx.pallas.late import nvvm, plgpu, scalar, utils
from optx.pallas.threads_sm90 import Number, Threads

GROUP = 128  # threads of a warpgroup
CHUNK = 8  # numbers of a thread's load
WIDEST = 16384  # numbers of a row; they take 2 bytes each of shared memory, those of a gate 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Normed:
    """x [1, D], y [1, D] if there is one, weight [D] -> their sum, which goes out, and its norm."""

    plan: add_norm.Plan
    name = "norm"

    @property
    def given(self) -> int:
        """Arrays that it takes."""
        return 2 + self.plan.added

    @property
    def streams(self) -> int:
        """Rows that go out beside the product."""
        return int(self.plan.added)

    @property
    def sums(self) -> int:
        """float32 numbers that threads share."""
        return self.plan.sums

    def room(self, split: int) -> int:
        """Numbers kept in shared memory by each of `split` blocks that share out the row."""
        return self.plan.width

    def first(self, rank, numbers: int):
        """Where in them those of block `rank` begin, which multiplies so many."""
        return rank * numbers

    def program(self, m, given, streams, row, sums, rank, numbers: int) -> None:
        *parts, weight = given
        add_norm.program(m, self.plan, parts, weight, [*streams, row], sums)

    def plainly(self, *given) -> list[jax.Array]:
        """-> [rows that go out, what is kept of the row] of one block that multiplies all of it."""
        x, y = given[0], given[1] if self.plan.added else None
        total, normed = norms.add_norm(x, y, given[-1], eps=self.plan.eps, offset=self.plan.offset)
        return [total, normed] if self.plan.added else [normed]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gated:
    """[gate | up] [1, 2D] -> act(gate) * up, in the place of the gate."""

    plan: gated_act.Plan
    name = "gated"
    given = 1
    streams = 0
    sums = 4  # none, but a buffer has a size

    def room(self, split: int) -> int:
        return 2 * self.plan.width // split

    def first(self, rank, numbers: int) -> int:
        return 0

    def program(self, m, given, streams, row, sums, rank, numbers: int) -> None:
        whole, up = numbers // CHUNK, 2 * self.plan.width
        chunks = []
        for begin in range(0, whole, GROUP):
            chunk = m.thread() + begin
            has = None if begin + GROUP <= whole else chunk < whole
            chunks.append((chunk if has is None else m.where(has, chunk, 0), has))
        for chunk, has in chunks:
            start, to = m.wide(rank * whole + chunk) * (2 * CHUNK), m.wide(chunk) * (2 * CHUNK)
            m.fetch(given[0], start, row, to, has)
            m.fetch(given[0], start + up, row, to + 2 * numbers, has)
        m.fetched()
        plan = dataclasses.replace(self.plan, width=numbers)
        for chunk, has in chunks:
            gated_act.act(m, plan, [row], row, chunk, has)

    def plainly(self, both) -> list[jax.Array]:
        return [both.at[:, : self.plan.width].set(acts.gated_act(both, None, activation=self.plan.activation))]


def normed(x, y, weight, *, eps: float, offset: float) -> Normed:
    facts = {"width": x.shape[-1], "dtype": str(x.dtype), "weight": str(weight.dtype), "added": y is not None}
    return Normed(plan=add_norm.Plan(tokens=1, eps=float(eps), offset=float(offset), most=GROUP, **facts))


def gated(both, activation: str) -> Gated:
    facts = {"width": both.shape[-1] // 2, "dtype": str(both.dtype), "activation": activation}
    return Gated(plan=gated_act.Plan(tokens=1, joined=True, **facts))


class Producer(Threads):
    """A warpgroup among others as all threads of the only block. What all thread blocks make alike, the first one stores."""

    def block(self):
        return Number(self._block.like(0))

    def thread(self):
        return self._thread & (GROUP - 1)

    def barrier(self):
        utils.warpgroup_barrier()

    def store_words(self, ref, offset, words, when=None):
        if not utils.is_smem_ref(ref):
            first = self._block < 1
            when = first if when is None else first & when
        super().store_words(ref, offset, words, when)


def make(made: Normed | Gated, given, streams, row, sums, place, *, split: int) -> None:
    """The row of shared memory, by all threads of the producer of thread block `place`; `split` of them share out a row."""
    refs = (*given, *streams, row, sums)

    @plgpu.inline_mgpu(arg_types=(*(plgpu.RefType() for _ in refs), scalar()), return_type=())
    def made_here(_, *args):
        *args, row, sums, place = args
        place = Number(place.registers.item())
        machine = Producer(place.value)
        given, streams = args[: made.given], args[made.given :]
        made.program(machine, given, streams, row, sums, place % split, made.plan.width // split)
        machine.barrier()
        return ()

    made_here(*refs, place)


def hand(row, slot, start, *, count: int) -> None:
    """`count` numbers of the row -> the first row of a slot bfloat16[8, count], by all threads of the producer. The other
    seven rows stay what they are, of which come columns of the product that nobody reads."""
    tiled = plgpu.RefType((plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), tiled, scalar()), return_type=())
    def handed(_, row, slot, start):
        start = Number(start.registers.item())
        hand_program(Producer(start.value), row, slot, start, count)
        nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)  # the matrix units read it
        return ()

    handed(row, slot, start)


def hand_program(m, row, slot, start, count: int) -> None:
    """16 bytes a thread. Tiles of 8 rows by 64 numbers lie side by side; in their first rows the swizzle moves nothing."""
    has = m.thread() < count // CHUNK
    chunk = m.where(has, m.thread(), 0)
    words = m.load(row, m.wide(start + chunk * CHUNK) * 2, CHUNK // 2)
    m.store_words(slot, m.wide((chunk >> 3) * 1024 + (chunk & 7) * 16), words, has)

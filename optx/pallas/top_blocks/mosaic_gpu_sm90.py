"""top_blocks on Hopper: a block of threads finds the lowest of a row's highest scores bit by bit, and writes what reaches it.

A thread holds neighbouring scores in registers as integers of the same order. For each bit of the threshold the block counts the
scores that reach it; then a scan over lanes and warps tells every thread where its chosen ones go, in order. XLA's sort moves
all scores and their places through many passes.

`_program` is written in a thread's numbers and takes the machine that works on them.
"""

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
from jax import lax

from optx.pallas.late import dependent, plgpu, scalar
from optx.pallas.threads_sm90 import Threads, across
from optx.pallas.top_blocks import reference

OP = "top_blocks"
WARP, GROUP, LARGEST = 32, 128, 1024  # threads: of a warp, of a warp group, of a block
EACH = 4  # scores of a thread, where a block has threads enough
MOST = 16 * LARGEST  # scores of a row; two counts of them fit in a word
LEAST = -(2**31)
NOTHING = -2139095041  # the integer of -inf


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What the kernel is specialised on; hashable, a static argument."""

    rows: int
    blocks: int
    count: int

    @property
    def threads(self) -> int:
        """Of a row, in whole warp groups."""
        return min(LARGEST, -(-self.blocks // (EACH * GROUP)) * GROUP)

    @property
    def each(self) -> int:
        """Scores of a thread."""
        return -(-self.blocks // (EACH * self.threads)) * EACH

    @property
    def width(self) -> int:
        """Scores of a row, with what fills up its threads."""
        return self.threads * self.each

    @property
    def warps(self) -> int:
        return self.threads // WARP


def supports(args, target) -> str | None:
    if (target.platform, target.arch) != ("gpu", "sm90"):
        return f"is for gpu/sm90, not {target.platform}/{target.arch}"
    return None


def top_blocks(scores: jax.Array, *, count: int) -> jax.Array:
    """As the reference, which itself takes rows of more than 16,384 scores."""
    plan = Plan(rows=scores.shape[0], blocks=scores.shape[1], count=count)
    if plan.blocks > MOST:
        return reference.top_blocks(scores, count=count)
    return _run(plan, scores)


@functools.partial(jax.jit, static_argnums=0)
def _run(plan: Plan, scores):
    """One function object for all layers of a shape: it is assembled once."""

    def body(scores, out, sums):
        @plgpu.inline_mgpu(arg_types=(*(plgpu.RefType(),) * 3, scalar()), return_type=())
        def row(_, scores, out, sums, block):
            _program(Threads(block.registers.item()), plan, scores, out, sums)
            return ()

        row(scores, out, sums, lax.axis_index("block"))

    padded = jnp.pad(scores, ((0, 0), (0, plan.width - plan.blocks)), constant_values=-jnp.inf)
    return dependent(
        body,
        out_type=jax.ShapeDtypeStruct((plan.rows, plan.count), jnp.int32),
        scratch_types=[plgpu.SMEM((2 * plan.warps,), jnp.float32)],
        grid=(plan.rows,),
        grid_names=("block",),
        num_threads=plan.threads // GROUP,
        thread_name="wg",
        kernel_name=OP,
    )(padded)


def _program(m, plan: Plan, scores, out, sums):
    """The work of all threads on machine m. Refs: scores float32[rows, width], out int32[rows, count]; sums, twice a number of
    the block's warps, is shared."""
    thread = m.thread()
    zero = thread & 0
    one = zero + 1
    base = m.wide(m.block()) * (4 * plan.width) + m.wide(thread * (4 * plan.each))
    words = [w for i in range(0, plan.each, EACH) for w in m.load(scores, base + 4 * i, EACH)]
    keys = [_ordered(m, word, zero) for word in words]
    turn = 0

    def counts(x):
        """x of the block's warps, in which it is equal for all lanes. Two places in turn: one barrier a time is enough."""
        nonlocal turn
        start, turn = turn * plan.warps, 1 - turn
        m.share(sums, (thread >> 5) + start, m.float(x), (thread & (WARP - 1)) < 1)
        m.barrier()
        return [m.bits(y) for i in range(0, plan.warps, 4) for y in m.shared(sums, start + i)]

    def reached(threshold):
        """Whether at least `count` scores of the row do."""
        mine = functools.reduce(operator.add, [m.where(key >= threshold, one, 0) for key in keys])
        return functools.reduce(operator.add, counts(across(m, mine, operator.add))) >= plan.count

    threshold = m.where(reached(zero), zero, LEAST)
    for bit in reversed(range(31)):
        higher = threshold + (1 << bit)
        threshold = m.where(reached(higher), higher, threshold)

    above = [m.where(key > threshold, one, 0) for key in keys]
    equal = [m.where(key >= threshold, one, 0) - x for key, x in zip(keys, above, strict=True)]
    both = [x + (y << 16) for x, y in zip(above, equal, strict=True)]
    before, total = zero, functools.reduce(operator.add, both)
    for distance in (1, 2, 4, 8, 16):  # of lanes before this one, in groups that double
        other = m.shuffle(total, distance)
        before = before + m.where((thread & distance) > 0, other, 0)
        total = total + other
    of_warps = counts(total)
    for warp, x in enumerate(of_warps):
        before = before + m.where((thread >> 5) > warp, x, 0)
    higher = functools.reduce(operator.add, of_warps) & 0xFFFF
    few = threshold < NOTHING + 1  # there are fewer than `count`
    ties = m.where(few, zero, zero + plan.count - higher)
    start = m.wide(m.block()) * (4 * plan.count)
    for i, (key, x) in enumerate(zip(keys, both, strict=True)):
        same = before >> 16
        place = (before & 0xFFFF) + m.where(same < ties, same, ties)
        chosen = (key > threshold) | ((key >= threshold) & (same < ties))
        m.store(out, start + m.wide(place * 4), thread * plan.each + i, 4, chosen)
        before = before + x
    for first in range(0, plan.count, plan.threads):
        place = thread + first
        missing = few & (place >= higher) & (place < plan.count)
        m.store(out, start + m.wide(place * 4), zero + plan.blocks, 4, missing)


def _ordered(m, word, zero):
    """The integer of a float32's bits that compares as it does; one for both zeros."""
    word = m.where(word < LEAST + 1, zero, word)
    return m.where(word < 0, word ^ 0x7FFFFFFF, word)

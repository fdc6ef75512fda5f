"""add_norm on Hopper: a block takes one token, adds, norms and stores it in one launch.

A thread holds 8 numbers of the token at a time, 16 bytes a load, and keeps them in registers from the sum of squares to the
product: x and y are read once. Lanes add by shuffles and warps through shared memory, over one barrier. XLA makes two kernels
of it, a reduction and a product, of a few microseconds each, which is more than their bytes take in a decode step.

Every rounding is the reference's own: the sum to the activations' type, the norm at its end. Norms differ from it only where
a sum of squares added up in another order, or the last bits of 1 / sqrt, tip a rounding. The sums of a token are added up
in one order whatever other tokens there are and however many threads work on it.

`program` is written in a thread's numbers and takes the machine that works on them.
"""

import dataclasses
import functools
import math
import operator

import jax
import jax.numpy as jnp
from jax import lax

from optx.errors import LoweringError
from optx.pallas.late import dependent, plgpu, scalar
from optx.pallas.threads_sm90 import Threads, across

OP = "add_norm"
WARP, GROUP, LARGEST = 32, 128, 1024  # threads: of a warp, of a warp group, of a block
CHUNK = 8  # numbers of a thread's load
WIDEST = 16384  # numbers of a token: 16 a thread
HALVES = ("bfloat16", "float16")
WEIGHTS = ("float32", *HALVES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What the kernel is specialised on; hashable, a static argument."""

    tokens: int
    width: int  # numbers of a token
    dtype: str
    weight: str  # its dtype
    eps: float
    offset: float
    added: bool  # there is a y
    most: int = LARGEST  # threads of a block

    @property
    def threads(self) -> int:
        """Of a block: a chunk each, in whole warp groups."""
        return min(self.most, -(-self.width // (CHUNK * GROUP)) * GROUP)

    @property
    def sums(self) -> int:
        """Sums of squares that warps share: of 32 chunks each."""
        return -(-self.width // (CHUNK * self.threads)) * self.threads // WARP


def supports(args, target) -> str | None:
    """args: d, dtype of the activations, weights (dtypes of the norms' weights)."""
    if (target.platform, target.arch) != ("gpu", "sm90"):
        return f"is for gpu/sm90, not {target.platform}/{target.arch}"
    return _reason(args["d"], args["dtype"], args["weights"])


def _reason(d: int, dtype: str, weights) -> str | None:
    if dtype not in HALVES:
        return f"activations of {dtype}; allowed: {', '.join(HALVES)}"
    if d % CHUNK or not 0 < d <= WIDEST:
        return f"{d} numbers a token; allowed: a multiple of {CHUNK}, at most {WIDEST}"
    wrong = [weight for weight in weights if weight not in WEIGHTS]
    return f"a weight of {wrong[0]}; allowed: {', '.join(WEIGHTS)}" if wrong else None


def add_norm(x, y, weight, *, eps: float, offset: float = 0.0) -> tuple[jax.Array, jax.Array]:
    """As the reference, for bfloat16 and float16. Raises: LoweringError for what the kernel does not take."""
    d = x.shape[-1]
    if reason := _reason(d, str(x.dtype), [str(weight.dtype)]):
        raise LoweringError(f"{OP}: {reason}; leave out 'require' in the recipe for the reference")
    if y is not None and y.dtype != x.dtype:
        raise LoweringError(f"{OP}: y is {y.dtype}; allowed: {x.dtype}, as x; cast it before")
    plan = Plan(
        tokens=math.prod(x.shape[:-1]),
        width=d,
        dtype=str(x.dtype),
        weight=str(weight.dtype),
        eps=float(eps),
        offset=float(offset),
        added=y is not None,
    )
    if not plan.tokens:
        return x, x
    *total, normed = _run(plan, [part.reshape(-1, d) for part in (x, y) if part is not None], weight)
    return total[0].reshape(x.shape) if total else x, normed.reshape(x.shape)


@functools.partial(jax.jit, static_argnums=0)
def _run(plan: Plan, parts, weight):
    """One function object for all layers of a shape: it is assembled once. -> ([sum,] norm)."""
    count = len(parts)

    def body(*refs):
        @plgpu.inline_mgpu(arg_types=(*(plgpu.RefType() for _ in refs), scalar()), return_type=())
        def token(_, *args):
            *refs, sums, block = args
            machine = Threads(block.registers.item())
            program(machine, plan, refs[:count], refs[count], refs[count + 1 :], sums)
            return ()

        token(*refs, lax.axis_index("block"))

    out = jax.ShapeDtypeStruct((plan.tokens, plan.width), jnp.dtype(plan.dtype))
    return dependent(
        body,
        out_type=(out,) * count,
        scratch_types=[plgpu.SMEM((plan.sums,), jnp.float32)],
        grid=(plan.tokens,),
        grid_names=("block",),
        num_threads=plan.threads // GROUP,
        thread_name="wg",
        kernel_name=OP,
    )(*parts, weight)


def program(m, plan: Plan, parts, weight, outs, sums):
    """The work of all threads on machine m. Refs: parts [x] or [x, y], weight, outs [norm] or [sum, norm]; sums, float32
    of the block's warps, is shared."""
    chunks = _chunks(m, plan)
    base = m.wide(m.block()) * (2 * plan.width)
    places = [base + m.wide(chunk * (2 * CHUNK)) for chunk, _ in chunks]
    weights = [_weights(m, plan, weight, chunk) for chunk, _ in chunks]  # first: they come from far away
    read = [[m.load_early(ref, at, CHUNK // 2) for at in places] for ref in parts]
    words = read[0] if len(read) == 1 else [_added(m, plan, *both) for both in zip(*read, strict=True)]
    words = [_or_zeros(m, has, found) for found, (_, has) in zip(words, chunks, strict=True)]
    if plan.added:
        for at, found, (_, has) in zip(places, words, chunks, strict=True):
            m.store_words(outs[0], at, found, has)
    numbers = [[x for word in found for x in m.unpack(word, plan.dtype)] for found in words]
    squares = [_tree([x * x for x in found]) for found in numbers]
    factor = m.rsqrt(_across_block(m, plan, squares, sums) * (1 / plan.width) + plan.eps)
    for at, found, scale, (_, has) in zip(places, numbers, weights, chunks, strict=True):
        normed = [x * factor * (w + plan.offset) for x, w in zip(found, scale, strict=True)]
        m.store_words(outs[-1], at, _packed(m, normed, plan.dtype), has)


def _chunks(m, plan: Plan):
    """(which chunk of the token, whether the thread has it; None: all have) for each that a thread holds. Threads without one
    read the first and work on zeros."""
    found = []
    whole = plan.width // CHUNK
    for start in range(0, whole, plan.threads):
        chunk = m.thread() + start
        has = None if start + plan.threads <= whole else chunk < whole
        found.append((chunk if has is None else m.where(has, chunk, 0), has))
    return found


def _or_zeros(m, has, words):
    return words if has is None else [m.where(has, word, 0) for word in words]


def _added(m, plan: Plan, x, y):
    pairs = [(m.unpack(a, plan.dtype), m.unpack(b, plan.dtype)) for a, b in zip(x, y, strict=True)]
    return [m.pack([p + q for p, q in zip(a, b, strict=True)], plan.dtype) for a, b in pairs]


def _packed(m, numbers, dtype: str):
    return [m.pack(numbers[i : i + 2], dtype) for i in range(0, len(numbers), 2)]


def _weights(m, plan: Plan, ref, chunk):
    if plan.weight == "float32":
        at = m.wide(chunk * (4 * CHUNK))
        return [m.float(word) for half in (0, 16) for word in m.load_early(ref, at + half, 4)]
    words = m.load_early(ref, m.wide(chunk * (2 * CHUNK)), CHUNK // 2)
    return [x for word in words for x in m.unpack(word, plan.weight)]


def _tree(numbers):
    """Their sum, by halves: few additions wait for each other."""
    while len(numbers) > 1:
        odd = numbers[len(numbers) & ~1 :]
        numbers = [a + b for a, b in zip(numbers[::2], numbers[1::2], strict=False)] + odd
    return numbers[0]


def _across_block(m, plan: Plan, numbers, sums):
    """The sum of a thread's numbers, one a chunk, over all threads of the block, the same in all of them."""
    for start, x in zip(range(0, plan.sums, plan.threads // WARP), numbers, strict=True):
        m.share(sums, (m.thread() >> 5) + start, across(m, x, operator.add), (m.thread() & (WARP - 1)) < 1)
    m.barrier()
    return _tree([y for start in range(0, plan.sums, 4) for y in m.shared(sums, start)])

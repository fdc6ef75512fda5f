"""gated_act on Hopper: a thread takes 8 numbers of the gate and the 8 beside them, 16 bytes a load, in one launch.

Sigmoid, activation and product are each rounded to the activations' type, as the reference's are. What lies within a sigmoid
or the tanh form of gelu is float32, of which XLA on a CPU rounds every part: x * sigmoid(2 u) is x * (1 + tanh(u)) / 2.

`program` is written in a thread's numbers and takes the machine that works on them.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from optx.errors import LoweringError
from optx.pallas.late import dependent, plgpu, scalar
from optx.pallas.threads_sm90 import Threads

OP = "gated_act"
THREADS = 128  # of a block
CHUNK = 8  # numbers of a thread
HALVES = ("bfloat16", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What the kernel is specialised on; hashable, a static argument."""

    tokens: int
    width: int  # numbers of a token's result
    joined: bool  # gate and up side by side in one array
    dtype: str
    activation: str

    @property
    def chunks(self) -> int:
        return self.tokens * self.width // CHUNK


def supports(args, target) -> str | None:
    """args: f, dtype of the activations, activation."""
    if (target.platform, target.arch) != ("gpu", "sm90"):
        return f"is for gpu/sm90, not {target.platform}/{target.arch}"
    return _reason(args["f"], args["dtype"], args["activation"])


def _reason(f: int, dtype: str, activation: str) -> str | None:
    if dtype not in HALVES:
        return f"activations of {dtype}; allowed: {', '.join(HALVES)}"
    if f % CHUNK or f < 1:
        return f"{f} numbers a token; allowed: a multiple of {CHUNK}"
    if activation not in FUNCTIONS:
        return f"activation {activation}; allowed: {', '.join(FUNCTIONS)}"
    return None


def gated_act(gate, up, *, activation: str) -> jax.Array:
    """As the reference, for bfloat16 and float16. Raises: LoweringError for what the kernel does not take."""
    f = gate.shape[-1] if up is not None else gate.shape[-1] // 2
    if reason := _reason(f, str(gate.dtype), activation):
        raise LoweringError(f"{OP}: {reason}; leave out 'require' in the recipe for the reference")
    if up is not None and up.dtype != gate.dtype:
        raise LoweringError(f"{OP}: up is {up.dtype}; allowed: {gate.dtype}, as gate; cast it before")
    shape = (*gate.shape[:-1], f)
    plan = Plan(tokens=math.prod(shape[:-1]), width=f, joined=up is None, dtype=str(gate.dtype), activation=activation)
    if not plan.tokens:
        return jnp.zeros(shape, gate.dtype)
    return _run(plan, [part.reshape(plan.tokens, -1) for part in (gate, up) if part is not None]).reshape(shape)


@functools.partial(jax.jit, static_argnums=0)
def _run(plan: Plan, parts):
    """One function object for all layers of a shape: it is assembled once."""

    def body(*refs):
        @plgpu.inline_mgpu(arg_types=(*(plgpu.RefType() for _ in refs), scalar()), return_type=())
        def chunk(_, *args):
            *parts, out, block = args
            program(Threads(block.registers.item()), plan, parts, out)
            return ()

        chunk(*refs, lax.axis_index("block"))

    return dependent(
        body,
        out_type=jax.ShapeDtypeStruct((plan.tokens, plan.width), jnp.dtype(plan.dtype)),
        grid=(-(-plan.chunks // THREADS),),
        grid_names=("block",),
        num_threads=1,
        thread_name="wg",
        kernel_name=OP,
    )(*parts)


def program(m, plan: Plan, parts, out):
    """The work of all threads on machine m. Refs: parts [gate, up] or both in one, out."""
    chunk = m.block() * THREADS + m.thread()
    has = None if plan.chunks % THREADS == 0 else chunk < plan.chunks
    act(m, plan, parts, out, chunk if has is None else m.where(has, chunk, 0), has)


def act(m, plan: Plan, parts, out, chunk, has):
    """One chunk of the result. has: whether the thread has it; None: all have."""
    at = m.wide(chunk) * (2 * CHUNK)
    if plan.joined:
        columns = plan.width // CHUNK
        start = m.wide(chunk // columns) * (4 * plan.width) + m.wide(chunk % columns) * (2 * CHUNK)
        places = [(parts[0], start), (parts[0], start + 2 * plan.width)]
    else:
        places = [(ref, at) for ref in parts]
    read = [m.load(ref, place, CHUNK // 2) for ref, place in places]
    words = [_word(m, plan, *(m.unpack(word, plan.dtype) for word in both)) for both in zip(*read, strict=True)]
    m.store_words(out, at, words, has)


def _word(m, plan: Plan, gate, up):
    acted = _rounded(m, FUNCTIONS[plan.activation](m, gate, plan.dtype), plan.dtype)
    return m.pack([a * b for a, b in zip(acted, up, strict=True)], plan.dtype)


def _rounded(m, pair, dtype: str):
    return m.unpack(m.pack(pair, dtype), dtype)


def _sigmoid(m, x):
    return m.reciprocal(m.exp2(x * -math.log2(math.e)) + 1.0)


def _silu(m, pair, dtype: str):
    shares = _rounded(m, [_sigmoid(m, x) for x in pair], dtype)
    return [x * share for x, share in zip(pair, shares, strict=True)]


def _gelu_tanh(m, pair, dtype: str):
    factor = 2 * math.sqrt(2 / math.pi)
    return [x * _sigmoid(m, (x * x * x * 0.044715 + x) * factor) for x in pair]


FUNCTIONS = {"silu": _silu, "gelu_tanh": _gelu_tanh}

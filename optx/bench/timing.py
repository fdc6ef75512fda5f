"""Device time of jitted functions, and the ceilings that bound it, measured in the same run.

Work is timed over several input sets in rotation (one set that fits the L2 cache would measure the cache), several calls
inside one program, the median of repeats. Inputs are random: zeros run faster than real data. On a GPU the kernels' own time
counts: what lies between two launches depends on the host, and in a whole step the launches run ahead of the device.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

REPEATS = 12
CALLS = 16  # calls a program: a launch from Python takes as long as a small kernel


def seconds(function: Callable, inputs: Sequence[tuple], calls: int = CALLS, repeats: int = REPEATS) -> float:
    """Median seconds of one `function(*inputs[i])`, `inputs` in rotation.

    function is traced `calls` times into one program, so its time holds the gaps between launches as a model's step would.
    """
    return measure(prepare(function, inputs, calls), repeats)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A compiled program of `calls` calls with its inputs."""

    program: Callable
    inputs: tuple
    calls: int

    def __call__(self):
        return jax.block_until_ready(self.program(self.inputs))


def prepare(function: Callable, inputs: Sequence[tuple], calls: int = CALLS) -> Prepared:
    """Compiles what `measure` times, without running it."""
    calls = max(calls, len(inputs))
    picks = [i % len(inputs) for i in range(calls)]

    @jax.jit
    def program(inputs):
        last = jnp.float32(0)
        for pick in picks:  # each call waits for the one before: two of them never share the chip
            args, last = jax.lax.optimization_barrier((inputs[pick], last))
            out = function(*args)
            last = last + jax.tree.leaves(out)[0].ravel()[0].astype(jnp.float32)
        return last

    inputs = tuple(tuple(args) for args in inputs)
    return Prepared(program.lower(inputs).compile(), inputs, calls)


def measure(prepared: Prepared, repeats: int = REPEATS) -> float:
    """Median seconds of one call: on a GPU the time that its kernels ran, gaps between launches left out; else `wall`."""
    if jax.default_backend() != "gpu":
        return wall(prepared, repeats)
    runs = [_kernel_seconds(prepared) for _ in range(max(3, repeats // 2))]
    return statistics.median(runs) / prepared.calls - _own_seconds()


def wall(prepared: Prepared, repeats: int = REPEATS) -> float:
    """Median seconds of one call by the host's clock, launches and gaps included."""
    for _ in range(2):
        prepared()
    return statistics.median(_timed(prepared) for _ in range(repeats)) / prepared.calls


def _kernel_seconds(prepared: Prepared) -> float:
    """Seconds that the kernels of the program ran, added up (CUPTI)."""
    from jax.experimental.mosaic.gpu import profiler  # takes a third of a second, which every verb would pay

    _, kernels = profiler.measure(prepared.program, aggregate=False)(prepared.inputs)
    return 1e-3 * sum(milliseconds for _, milliseconds in kernels)


@functools.cache
def _own_seconds() -> float:
    """Seconds of the small kernel by which `prepare` makes each call wait for the one before."""
    prepared = prepare(lambda x: x, [(random((1 << 16,), seed=i),) for i in range(2)])
    return statistics.median(_kernel_seconds(prepared) for _ in range(5)) / prepared.calls


def _timed(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What the running device reaches on plain work: bytes/s read, FLOP/s of square matmuls by format."""

    device: str
    read: float
    bf16: float
    fp8: float | None = None


def random(shape, dtype=jnp.bfloat16, seed: int = 0, scale: float = 1.0) -> jax.Array:
    """Normal numbers made on the device."""
    return _normal(tuple(shape), jnp.dtype(dtype), seed, scale)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _normal(shape, dtype, seed, scale):
    return (scale * jax.random.normal(jax.random.key(seed), shape, jnp.float32)).astype(dtype)


@functools.cache
def read_ceiling() -> float:
    """Bytes/s that the running device reads in a sum over 4 GiB of bfloat16 (on a CPU, which widens it slowly, over 256 MiB of
    float32)."""
    size, dtype = (1 << 26, jnp.float32) if jax.default_backend() == "cpu" else (1 << 31, jnp.bfloat16)
    data = random((size,), dtype)
    return data.nbytes / seconds(lambda x: jnp.sum(x.astype(jnp.float32)), [(data,)], calls=4)


@functools.cache
def ceilings() -> Ceilings:
    """Measures the running device: a sum over 4 GiB, and products of 8192^2 matrices (far smaller on a CPU)."""
    device = jax.devices()[0]
    size = 1024 if device.platform == "cpu" else 8192
    flops = 2 * size**3

    def rate(dtype) -> float:
        pairs = [(random((size, size), dtype, 2 * i), random((size, size), dtype, 2 * i + 1)) for i in range(2)]
        contract = (((1,), (1,)), ((), ()))  # both operands contract over their last axis, as fp8 units want
        product = lambda a, b: jax.lax.dot_general(a, b, contract, preferred_element_type=jnp.bfloat16)  # noqa: E731
        return flops / seconds(product, pairs, calls=8)

    fp8 = rate(jnp.float8_e4m3fn) if device.platform == "gpu" else None
    return Ceilings(device=device.device_kind, read=read_ceiling(), bf16=rate(jnp.bfloat16), fp8=fp8)


def relative_error(out: Any, reference: Any) -> float:
    """|out - reference| / |reference| over all numbers, NaN if any is; inf where only one of the two is finite."""
    out, reference = (jnp.asarray(x, jnp.float32) for x in (out, reference))
    finite = jnp.isfinite(reference)
    if bool(jnp.any(jnp.where(finite, False, out != reference))):
        return float("inf")
    norm = jnp.linalg.norm(jnp.where(finite, reference, 0))
    return float(jnp.linalg.norm(jnp.where(finite, out - reference, 0)) / jnp.maximum(norm, 1e-30))

"""Decode and prefill speed of a model at batch 1 on the running machine, host time a step, and compiles after warm-up.

    python -m optx.bench.decode MODEL [--weights packed] [--recipe NAME] [--prompt 512] [--tokens 128]

Prefill is a prompt of 512 tokens, decode 128 tokens after a prompt of 16; each the best of three runs. Two ceilings from the
same run: reading (a float32 matrix-vector product over 256 MB) bounds a decode step by its bytes, arithmetic (a float32
product of 512 rows) bounds prefill by the multiply-adds of the weights, embedding and head left out.
"""

import argparse
import dataclasses
import json
import time

import jax
import jax.numpy as jnp
import numpy as np

import optx
from optx import ir
from optx.engine.engine import Engine
from optx.engine.sampling import Chosen


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
    """Tokens/s, milliseconds and bytes of one model."""

    decode: float  # tokens/s
    prefill: float  # tokens/s
    host_ms: float  # a decode step outside the device program: planning, dispatch, hand-out
    step_ms: float  # a decode step
    bytes_per_token: float
    bandwidth: float  # bytes/s, measured
    of_read_bound: float  # bound / measured time of a decode step
    flops: float  # FLOP/s, measured
    of_flop_bound: float  # bound / measured time of the prefill
    compiles_after_warm_up: int


def read_bandwidth() -> float:
    """Bytes/s of a float32 matrix-vector product over 256 MB."""
    w, x = jnp.ones((8192, 8192), jnp.float32), jnp.ones((8192,), jnp.float32)
    f = jax.jit(jnp.matmul)
    return w.nbytes / min(_timed(lambda: jax.block_until_ready(f(w, x))) for _ in range(5))


def matmul_rate() -> float:
    """FLOP/s of a float32 product [512, 576] @ [576, 3072], twenty weights in rotation."""
    x, ws = jnp.ones((512, 576), jnp.float32), [jnp.ones((576, 3072), jnp.float32) for _ in range(20)]
    f = jax.jit(lambda x, ws: [x @ w for w in ws])
    return 20 * 2 * 512 * 576 * 3072 / min(_timed(lambda: jax.block_until_ready(f(x, ws))) for _ in range(5))


def _timed(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _run(engine: Engine, prompt: list[int], tokens: int) -> tuple[float, float]:
    """(seconds of the prompt, seconds a decoded token) of one request."""
    engine.add_request(prompt, optx.Sampling(max_tokens=tokens, ignore_eos=True))
    first, steps = 0.0, []
    while not engine.idle:
        start = time.perf_counter()
        got = engine.step()
        spent = time.perf_counter() - start
        if got and len(got[0][0].output) > 1:
            steps.append(spent)
        else:
            first += spent
    return first, float(np.mean(steps))


def _host_seconds(engine: Engine, prompt: list[int], tokens: int) -> float:
    """Median seconds of a decode dispatch whose device program returns its inputs: planning, dispatch, hand-out."""
    stepper = engine._stepper
    real = stepper._ticks

    def nothing(ticks):
        def run(leaves, caches, rows, packed, *_):
            size = rows.newest.shape[0]
            return caches, rows, Chosen(tokens=jnp.zeros((ticks, size), jnp.int32) + packed[0] * 0)

        return jax.jit(run, donate_argnums=(1, 2))

    stepper._ticks = {key: nothing(key[1]) for key in real}
    try:
        engine.add_request(prompt, optx.Sampling(max_tokens=tokens, ignore_eos=True))
        spent = []
        while not engine.idle:
            spent.append(_timed(engine.step))
    finally:
        stepper._ticks = real
    return float(np.median(spent))


def measure(compiled: optx.Compiled, prompt: int, tokens: int) -> Speed:
    chunk = max(16, 1 << (prompt - 1).bit_length())
    ids = [int(x) for x in np.random.default_rng(0).integers(0, compiled.vocab, prompt)]
    long = compiled.engine(rows=1, context=chunk + 64, chunks=(chunk,))
    short = compiled.engine(rows=1, context=16 + tokens, chunks=(16,))
    _run(long, ids, 2)
    _run(short, ids[:16], 4)
    warm = long.compiles + short.compiles
    first = min(_run(long, ids, 2)[0] for _ in range(3))
    step = min(_run(short, ids[:16], tokens)[1] for _ in range(3))
    read = sum(compiled.plan.bytes_per_token(1, 16 + tokens // 2).values())
    linear = 2 * prompt * sum(ir.active_count(layer) for layer in compiled.tree.layers)
    bandwidth, flops = read_bandwidth(), matmul_rate()
    return Speed(
        decode=1 / step,
        prefill=prompt / first,
        host_ms=1e3 * _host_seconds(short, ids[:16], tokens),
        step_ms=1e3 * step,
        bytes_per_token=read,
        bandwidth=bandwidth,
        of_read_bound=read / bandwidth / step,
        flops=flops,
        of_flop_bound=linear / flops / first,
        compiles_after_warm_up=long.compiles + short.compiles - warm,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--weights", default="dense", choices=["dense", "packed"])
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--recipe", default=None)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    args = parser.parse_args()
    recipe = optx.Recipe.from_yaml(args.recipe) if args.recipe else None
    compiled = optx.compile(optx.load(args.model, weights=args.weights, dtype=args.dtype), recipe)
    print(json.dumps(dataclasses.asdict(measure(compiled, args.prompt, args.tokens)), indent=1))


if __name__ == "__main__":
    main()

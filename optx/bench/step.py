"""One decode step of a model's shape with random weights on the running device: time, compile time, bytes against bandwidth.

    python -m optx.bench.step CONFIG [--recipe NAME] [--batch 1,32] [--context 896] [--require xla] [--json FILE]

CONFIG is a config.json: nothing is downloaded. The step is the engine's own tick, greedy, caches donated; its time is the mean of
32 ticks in a row, each fed by the one before.
"""

import argparse
import dataclasses
import functools
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import optx
from optx import ir, lower
from optx.bench import timing
from optx.cache import Layout, pages_for
from optx.engine.step import Stepper, Tick
from optx.recipe import Recipe
from optx.report import table

TICKS = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTime:
    """A decode step of `batch` sequences at `context` tokens."""

    model: str
    batch: int
    context: int
    milliseconds: float
    compile_seconds: float
    bytes: float  # read: weights and caches, as planned
    of_read_ceiling: float  # bytes / time / measured bandwidth
    kernels: str


def random_weights(tree: nnx.Module, seed: int = 0) -> nnx.Module:
    """A concrete copy of an abstract tree: random bits in integer leaves, small normal numbers in the others."""
    graph, state = nnx.split(tree)
    leaves, treedef = jax.tree.flatten(state)

    def draw(i, leaf):
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jax.random.bits(jax.random.key(seed + i), leaf.shape, f"uint{8 * leaf.dtype.itemsize}").astype(
                leaf.dtype
            )
        return timing.random(leaf.shape, leaf.dtype, seed + i, 0.02)

    return nnx.merge(graph, jax.tree.unflatten(treedef, [draw(i, leaf) for i, leaf in enumerate(leaves)]))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _bits(shape, dtype, seed):
    return jax.random.bits(jax.random.key(seed), shape, f"uint{8 * dtype.itemsize}").astype(dtype)


def ticks(stepper: Stepper, batch: int, context: int, page_size: int):
    """The decode tick of `batch` rows whose pages lie in random order; the same context every time."""
    width = pages_for(context, page_size)
    pages = np.random.default_rng(0).permutation(batch * width).astype(np.int32).reshape(1, batch, width)
    last = pages[0, :, (context - 1) // page_size] * page_size + (context - 1) % page_size
    groups = len(stepper.program.plan.keys)
    return Tick(
        tokens=np.full(batch, -1, np.int32),
        counts=np.ones(batch, np.int32),
        starts=np.full(batch, context - 1, np.int32),
        slots=np.arange(batch, dtype=np.int32),
        seeds=np.zeros(batch, np.uint32),
        tables=(pages,) * groups,
        lengths=(np.full((1, batch), context, np.int32),) * groups,
        writes=(last.astype(np.int32)[None],) * groups,
        limits=np.full(batch, TICKS, np.int32),
        stops=np.full((batch, 1), -1, np.int32),
        sampling=np.zeros((batch, 3), np.float32),
    )


def measure(planned: optx.Plan, tree: nnx.Module, batch: int, context: int, page_size: int, read: float) -> StepTime:
    program = lower.Program.of(tree)
    layout = Layout(pages=batch * pages_for(context, page_size), page_size=page_size, slots=batch)
    stepper = Stepper(program, [layout] * max(len(program.plan.keys), 1), batch)
    tick = ticks(stepper, batch, context, page_size)
    start = time.perf_counter()
    jax.block_until_ready(stepper(tick, greedy=True))
    compiled = time.perf_counter() - start
    jax.block_until_ready(stepper(tick, greedy=True))
    start = time.perf_counter()
    for _ in range(TICKS):
        chosen = stepper(tick, greedy=True)
    jax.block_until_ready(chosen)
    seconds = (time.perf_counter() - start) / TICKS
    moved = sum(planned.bytes_per_token(batch, context).values())
    return StepTime(
        model=planned.name,
        batch=batch,
        context=context,
        milliseconds=1e3 * seconds,
        compile_seconds=compiled,
        bytes=moved,
        of_read_ceiling=moved / seconds / read,
        kernels=lower.explain(tree),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("--recipe", action="append", default=[], help="may be repeated; none: as the config says")
    parser.add_argument("--batch", default="1,32")
    parser.add_argument("--context", type=int, default=896)
    parser.add_argument("--page_size", type=int, default=64)
    parser.add_argument("--require", help="backend, as in a recipe")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    read, found = timing.read_ceiling(), []
    for name in args.recipe or [None]:
        recipe = Recipe.from_yaml(name) if name else Recipe(name="none")
        planned = optx.plan(optx.load_config(args.config, "bfloat16"), recipe, "auto")
        tree = lower.lower(random_weights(planned.tree), planned.target, args.require)
        print(f"{planned.name}: {ir.size_text(ir.weight_bytes(tree))} of weights\n{lower.explain(tree)}", flush=True)
        for batch in map(int, args.batch.split(",")):
            found.append(measure(planned, tree, batch, args.context, args.page_size, read))
        del tree
    header = ("model", "batch", "context", "ms a step", "tokens/s", "GB a step", "% of read ceiling", "compile s")
    rows = [
        [s.model, f"{s.batch}", f"{s.context}", f"{s.milliseconds:.2f}", f"{1e3 * s.batch / s.milliseconds:,.0f}",
         f"{s.bytes / 1e9:.2f}", f"{100 * s.of_read_ceiling:.0f}", f"{s.compile_seconds:.1f}"]
        for s in found
    ]  # fmt: skip
    print(f"{jax.devices()[0].device_kind}: read {read / 1e12:.2f} TB/s\n{table(header, rows)}")
    if args.json:
        args.json.write_text(json.dumps([dataclasses.asdict(s) for s in found], indent=1))


if __name__ == "__main__":
    main()

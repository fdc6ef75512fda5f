"""One decode step of a model's shape with random weights on the running device: time, compile time, bytes against bandwidth.

    optx bench decode [--shape CONFIG] [--batch 32] [--context 896] [--recipe NAME] [--require xla] [--out FILE]
    optx bench decode --against-plan ...     beside what the plan predicts: optx/bench/against.py
    python -m optx.bench.step CONFIG [--recipe NAME] [--batch 1,32] [--context 896] [--require xla] [--json FILE]

CONFIG is the name of one of SHAPES, of a config that ships with optx, or a config.json: nothing is downloaded. The step is the
engine's own tick, greedy, caches donated; its time is the mean of 32 ticks in a row. Rows have different tokens, so that
experts are chosen as by the sequences of a real batch. The bound is what the plan says is read, by the bandwidth measured in
the same run; for experts that is what uniform routing makes expect. What a step writes is not in it: of a state cache as much
as it reads.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import optx
from optx import ir, lower
from optx.bench import timing
from optx.cache import CacheSpec, Layout
from optx.checkpoint.source import Source
from optx.configs import model_names, model_path
from optx.engine.pages import PagePool, PageTable
from optx.engine.step import Stepper, Tick
from optx.errors import UsageError, did_you_mean
from optx.recipe import Recipe
from optx.report import table

TICKS = 32
FOLDER = Path(__file__).parent / "shapes"  # published widths with layers and experts that one card holds
SHAPES = ("qwen3-30b-a3b", "deepseek-v3-small-like", "qwen3-next-small-like")
BATCHES = (1, 32, 128)
CONTEXT = 896  # tokens
PAGE = 64  # tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTime:
    """A decode step of `batch` sequences at `context` tokens."""

    model: str
    batch: int
    context: int
    milliseconds: float
    compile_seconds: float
    weight_bytes: float  # read, as planned
    cache_bytes: float  # read, as planned
    bound_milliseconds: float  # bytes / measured bandwidth
    times_bound: float  # measured / bound
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """The pages of `batch` rows of `context` tokens in one token group, as the engine would have them, in random order."""

    table: np.ndarray  # int32[1, B, pages]
    lengths: np.ndarray  # int32[1, B]
    newest: np.ndarray  # int32[B], flat slot of each row's last token
    positions: np.ndarray  # int32[pages + 1, P]

    @property
    def pages(self) -> int:
        return len(self.positions) - 1


def rows_of(spec: CacheSpec, batch: int, context: int, page_size: int) -> Rows:
    """Of a cache that throws tokens away: the most slots that rows hold, numbered from 0."""
    tokens, spec = (spec.tokens(context), spec.replace(evict=None)) if spec.evict else (context, spec)
    width = PageTable.width_for(spec, tokens, page_size, page_size)
    table = PageTable(spec, PagePool(batch * width), rows=batch, width=width, page_size=page_size)
    for start in range(0, tokens, page_size):
        count = min(page_size, tokens - start)
        slots = table.append_rows(np.arange(batch), np.full(batch, count))
    order = np.random.default_rng(0).permutation(batch * width).astype(np.int32)
    positions = np.zeros((batch * width + 1, page_size), np.int32)
    for row in range(batch):
        places = table.listed(row)
        if tokens % page_size:
            places |= {tokens // page_size: int(slots[(row + 1) * count - 1]) // page_size}
        for place, page in places.items():
            positions[order[page]] = place * page_size + np.arange(page_size)
    newest = slots[count - 1 :: count]
    return Rows(
        table=order[table.table][None],
        lengths=table.lengths[None].copy(),
        newest=order[newest // page_size] * page_size + newest % page_size,
        positions=positions,
    )


def ticks(stepper: Stepper, rows: Sequence[Rows], batch: int, context: int) -> Tick:
    """The decode tick of `batch` rows; the same context every time."""
    tokens = np.random.default_rng(1).integers(
        0, stepper.program.vocab, batch
    )  # one for all would take the same experts
    return Tick(
        tokens=tokens.astype(np.int32),
        counts=np.ones(batch, np.int32),
        starts=np.full(batch, context - 1, np.int32),
        slots=np.arange(batch, dtype=np.int32),
        seeds=np.zeros(batch, np.uint32),
        tables=tuple(group.table for group in rows),
        lengths=tuple(group.lengths for group in rows),
        writes=tuple(group.newest[None] for group in rows),
        limits=np.full(batch, TICKS, np.int32),
        stops=np.full((batch, 1), -1, np.int32),
        prompts=np.zeros(batch, np.int32),
        biased=np.zeros((batch, 0), np.int32),
        sampling=np.zeros((batch, 7), np.float32),
    )


def stepping(tree: nnx.Module, batch: int, context: int, page_size: int) -> Callable[[], object]:
    """The engine's tick of a lowered tree, greedy: a call runs one."""
    program = lower.Program.of(tree)
    rows = [rows_of(spec, batch, context, page_size) for spec in program.plan.groups]
    room = functools.partial(Layout, page_size=page_size, slots=batch)
    stepper = Stepper(program, [room(pages=group.pages) for group in rows] or [room(pages=1)], batch)
    stepper.caches = dataclasses.replace(
        stepper.caches, positions=tuple(jnp.asarray(group.positions) for group in rows)
    )
    return functools.partial(stepper, ticks(stepper, rows, batch, context), "greedy")


def timed(step: Callable[[], object]) -> tuple[float, float]:
    """(seconds of one step in a row of them, seconds of the first, which compiles)."""
    start = time.perf_counter()
    jax.block_until_ready(step())
    compiled = time.perf_counter() - start
    jax.block_until_ready(step())
    start = time.perf_counter()
    for _ in range(TICKS):
        chosen = step()
    jax.block_until_ready(chosen)
    return (time.perf_counter() - start) / TICKS, compiled


def measure(planned: optx.Plan, tree: nnx.Module, batch: int, context: int, page_size: int, read: float) -> StepTime:
    seconds, compiled = timed(stepping(tree, batch, context, page_size))
    moved = planned.bytes_per_token(batch, context)
    bound = sum(moved.values()) / read
    return StepTime(
        model=planned.name,
        batch=batch,
        context=context,
        milliseconds=1e3 * seconds,
        compile_seconds=compiled,
        weight_bytes=moved["weights"],
        cache_bytes=moved["kv"],
        bound_milliseconds=1e3 * bound,
        times_bound=seconds / bound,
        kernels=lower.explain(tree),
    )


def source(shape: str, dtype: str | None = None) -> Source:
    """The config of a shape of benches, of one that ships with optx, or at a path. Raises UsageError naming the nearest."""
    mine = {path.stem: path for path in FOLDER.glob("*.json")}
    found = mine | {name: model_path(name) for name in model_names()}
    path = found.get(shape, Path(shape))
    if not path.is_file():
        raise UsageError(f"shape {shape!r}: no such config.json{did_you_mean(shape, found)}")
    return optx.load_config(path, dtype)


def run(
    shapes: Sequence[str] = SHAPES,
    *,
    batches: Sequence[int] = BATCHES,
    context: int = CONTEXT,
    recipes: Sequence[Recipe | None] = (None,),
    require: str | None = None,
    dtype: str | None = None,
    page_size: int = PAGE,
    say: Callable[[str], None] = lambda text: None,
) -> list[StepTime]:
    """Times every shape under every recipe (None: as the config says) at every batch. say: called with what is under way."""
    read, found = timing.read_ceiling(), []
    for planned, make in lowered(shapes, recipes, require=require, dtype=dtype, say=say):
        tree = make()
        found += [measure(planned, tree, batch, context, page_size, read) for batch in batches]
        del tree
    return found


def lowered(
    shapes: Sequence[str],
    recipes: Sequence[Recipe | None],
    *,
    require: str | None,
    dtype: str | None,
    say: Callable[[str], None],
) -> Iterator[tuple[optx.Plan, Callable[[], nnx.Module]]]:
    """The plan of every shape under every recipe for the running device, and what makes its tree with random weights: a device
    holds one at a time."""

    def make(planned: optx.Plan) -> nnx.Module:
        tree = lower.lower(random_weights(planned.tree), planned.target, require)
        say(f"{planned.name}: {ir.size_text(ir.weight_bytes(tree))} of weights\n{lower.explain(tree)}")
        return tree

    for shape, recipe in itertools.product(shapes, recipes):
        planned = optx.plan(source(shape, dtype), recipe, "auto")
        yield planned, functools.partial(make, planned)


HEADER = ("model", "batch", "context", "ms a step", "tokens/s", "GB a step", "bound, ms", "x bound", "compile s")


def text(found: Sequence[StepTime]) -> str:
    rows = [
        [s.model, f"{s.batch}", f"{s.context}", f"{s.milliseconds:.3g}", f"{1e3 * s.batch / s.milliseconds:,.0f}",
         f"{(s.weight_bytes + s.cache_bytes) / 1e9:.3g}", f"{s.bound_milliseconds:.3g}", f"{s.times_bound:.2f}",
         f"{s.compile_seconds:.1f}"]
        for s in found
    ]  # fmt: skip
    read = timing.read_ceiling() / 1e12
    return f"{jax.devices()[0].device_kind}: read {read:.3g} TB/s, measured\n{table(HEADER, rows)}"


def to_dict(found: Sequence[StepTime]) -> dict:
    return {
        "device": jax.devices()[0].device_kind,
        "read_bytes_per_second": timing.read_ceiling(),
        "steps": [dataclasses.asdict(step) for step in found],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("--recipe", action="append", default=[], help="may be repeated; none: as the config says")
    parser.add_argument("--batch", default="1,32")
    parser.add_argument("--context", type=int, default=CONTEXT)
    parser.add_argument("--page_size", type=int, default=PAGE)
    parser.add_argument("--require", help="backend, as in a recipe")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = run(
        [args.config], batches=[int(size) for size in args.batch.split(",")], context=args.context,
        recipes=[Recipe.from_yaml(name) for name in args.recipe] or [None], require=args.require, dtype="bfloat16",
        page_size=args.page_size, say=functools.partial(print, flush=True),
    )  # fmt: skip
    print(text(found))
    if args.json:
        args.json.write_text(json.dumps(to_dict(found), indent=1))


if __name__ == "__main__":
    main()

"""A served load on the bare engine, without HTTP: what a server is measured against, and the engine's own figures.

The bound is that of an engine which never waits: prompts at the arithmetic that the device reaches on a square product (weights'
multiply-adds; attention and head left out) and then every answer at full batch, its steps at the bytes of the plan by the
bandwidth measured in the same process.
"""

import collections
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
import yaml
from tqdm import tqdm

import optx
from optx import ir, lower, strict
from optx.bench import decode, step, timing
from optx.bench.figures import Outcome, summarize
from optx.bench.load import Ask, Load, asks, flag
from optx.checkpoint.source import Source
from optx.engine.engine import Engine, EngineOptions
from optx.engine.request import Sampling
from optx.errors import RequestError, UsageError
from optx.recipe import Recipe
from optx.report import table

ROWS = 256  # decoded at once where neither the load nor an option says less


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bare:
    """The engine under the load."""

    in_process: str | None = flag("drive the bare engine: a model, or the name of a config (random weights)")
    recipe: str | None = flag("in process, YAML file, or the name of a recipe that ships with optx")
    require: str | None = flag("in process, a backend that every op must use where it has one")
    dtype: str | None = flag("in process, of dense weights and activations")
    weights: str = flag("in process, dense, or packed to keep the blocks of the file", "dense")
    engine: tuple = flag("in process, an engine option, as in rows=64 or chunks=[512,2048]", ())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """Seconds from nothing to the first token, one after the other."""

    weights: float  # read or drawn, passes applied, on the device
    compile: float  # every program of the load
    first_token: float  # of a prompt of the load's length

    @property
    def total(self) -> float:
        return self.weights + self.compile + self.first_token


def options(bare: Bare, load: Load) -> EngineOptions:
    """Rows and context that the load needs, and what the flags say. Raises UsageError naming the option."""
    given = {}
    for text in bare.engine:
        name, _, value = text.partition("=")
        given[name] = yaml.safe_load(value)
    rows = min(load.in_flight, ROWS)
    try:
        return strict.load(EngineOptions, {"rows": rows, "context": load.longest + 1} | given, "--engine")
    except optx.errors.RecipeError as error:
        raise UsageError(str(error)) from None


def compiled(bare: Bare) -> optx.Compiled:
    """The model, compiled; a config gets random weights."""
    recipe = Recipe.from_yaml(bare.recipe) if bare.recipe else None
    if bare.require:
        recipe = dataclasses.replace(recipe or Recipe(name="none"), require=bare.require)
    source = _source(bare)
    if source.origin.bytes:
        return optx.compile(source, recipe)
    planned = optx.plan(source, recipe)
    tree = lower.lower(step.random_weights(planned.tree), planned.target, planned.recipe.require)
    return optx.Compiled(tree, planned)


def _source(bare: Bare) -> Source:
    if bare.in_process in step.SHAPES:
        return step.source(bare.in_process, bare.dtype)
    return optx.load(bare.in_process, bare.weights, bare.dtype)


def run(
    bare: Bare,
    load: Load,
    slo: Mapping[str, float],
    *,
    progress: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> dict:
    """Figures of the load as `figures.summarize` has them, with `form`, `model` and `engine` (`EngineFigures`)."""
    ceilings = (timing.read_ceiling(), _flops())
    start = time.perf_counter()
    model = compiled(bare)
    jax.block_until_ready(model.program.leaves)
    weights = time.perf_counter() - start
    say(f"{model.plan.name}: {ir.size_text(ir.weight_bytes(model.tree))} of weights\n{model.explain()}")
    load = dataclasses.replace(load, vocab=min(load.vocab, model.vocab))
    engine = model.engine(**vars(options(bare, load)))
    start = time.perf_counter()
    engine.warm_up(_sampling(load, load.output_len), progress=progress)
    compile = time.perf_counter() - start
    start = time.perf_counter()
    next(engine.stream([0] * min(load.input_len, engine.context - 1), _sampling(load, 1)))
    began = Start(weights=weights, compile=compile, first_token=time.perf_counter() - start)
    before = engine.stats()
    outcomes, inside = drive(engine, load, asks(load), progress=progress)
    after = engine.stats()
    steps, cached = after.steps - before.steps, after.prefix_hit_tokens - before.prefix_hit_tokens
    figures = {"form": "in process", "model": model.plan.name} | summarize(outcomes, load, slo)
    found = EngineFigures(
        device=jax.devices()[0].device_kind,
        weights_seconds=began.weights,
        compile_seconds=began.compile,
        first_token_seconds=began.first_token,
        start_seconds=began.total,
        compiles=after.compiles,
        compiles_after_warm_up=after.compiles - before.compiles,
        steps=steps,
        step_ms=1e3 * inside / steps,
        host_ms=1e3 * (inside - after.waited + before.waited) / steps,
        preemptions=after.preemptions - before.preemptions,
        prefix_hit_tokens=cached,
        **_bounds(model, min(engine.options.rows, load.in_flight), outcomes, figures, cached, *ceilings),
    )
    return figures | {"engine": dataclasses.asdict(found)}


def _sampling(load: Load, tokens: int) -> Sampling:
    return Sampling(max_tokens=tokens, temperature=load.temperature, ignore_eos=load.ignore_eos)


def drive(engine: Engine, load: Load, todo: Sequence[Ask], *, progress: bool = False) -> tuple[list[Outcome], float]:
    """Sends the requests at their times, at most `load.in_flight` at once -> (their outcomes, seconds inside `step`)."""
    waiting, live, outcomes, inside = collections.deque(todo), {}, [], 0.0
    began = time.perf_counter()
    with tqdm(total=len(todo), desc="requests", disable=not progress) as bar:
        while waiting or live:
            now = time.perf_counter()
            while waiting and waiting[0].at <= now - began and len(live) < load.in_flight:
                ask = waiting.popleft()
                outcome = Outcome(sent=time.perf_counter(), prompt_tokens=len(ask.prompt))
                outcomes.append(outcome)
                sampling = dataclasses.replace(_sampling(load, ask.tokens), seed=len(outcomes))
                try:
                    request = engine.add_request(ask.prompt, sampling)
                except RequestError as error:
                    outcome.error = str(error)
                    bar.update()
                    continue
                live[request.id] = (request, outcome)
            if not live:
                time.sleep(max(0.0, waiting[0].at - (now - began)) if waiting else 0.0)
                continue
            start = time.perf_counter()
            found = engine.step()
            now = time.perf_counter()
            inside += now - start
            for request, _ in found:
                live[request.id][1].arrivals.append(now)
            for request, outcome in [pair for pair in live.values() if pair[0].finish is not None]:
                del live[request.id]
                outcome.output_tokens = len(request.output)
                if request.finish not in ("stop", "length"):
                    outcome.error = f"the engine ended the request: {request.finish}"
                bar.update()
    return outcomes, inside


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineFigures:
    """The engine under the load; the key `engine` of the JSON."""

    device: str
    weights_seconds: float  # to read or draw them and to apply the passes
    compile_seconds: float  # every program of the load
    first_token_seconds: float  # of a prompt of the load's length, alone
    start_seconds: float  # the three together
    compiles: int
    compiles_after_warm_up: int
    steps: int  # dispatches of the load; one may hold several ticks
    step_ms: float  # mean time inside `step`
    host_ms: float  # of it, outside waiting for the device; on a CPU, where a dispatch may compute, more than the engine's own
    preemptions: int
    prefix_hit_tokens: int  # of prompts, not computed again
    mean_batch: float  # requests decoding, over the whole load
    mean_context: float  # tokens of a request in the middle of its answer
    read_bytes_per_second: float  # measured
    flops_per_second: float  # measured
    step_bytes: float  # a decode step at mean batch and context, as planned
    decode_bound: float  # output tokens/s that these bytes allow
    bound: float  # output tokens/s of an engine that never waits, prompts included
    of_bound: float  # measured / bound


def _bounds(
    model: optx.Compiled,
    full: int,
    outcomes: Sequence[Outcome],
    figures: Mapping,
    cached: int,
    read: float,
    flops: float,
) -> dict[str, float]:
    done = [outcome for outcome in outcomes if outcome.error is None]
    if not done:
        raise RequestError(f"no request of {len(outcomes)} was completed: {next(iter(figures['errors']))}")
    batch = max(1.0, sum(o.e2e - o.ttft for o in done) / figures["seconds"]) if figures["seconds"] else 1.0
    context = float(np.mean([o.prompt_tokens + o.output_tokens / 2 for o in done]))
    moved = functools.partial(_step_bytes, model, context=round(context))
    weights = sum(ir.active_count(layer) for layer in model.tree.layers)
    prompts = 2 * weights * max(figures["prompt_tokens"] - cached, 0) / flops
    answers = (figures["output_tokens"] - len(done)) / full * moved(full) / read
    bound = figures["output_tokens"] / (prompts + answers)
    return {
        "mean_batch": batch,
        "mean_context": context,
        "read_bytes_per_second": read,
        "flops_per_second": flops,
        "step_bytes": moved(round(batch)),
        "decode_bound": round(batch) * read / moved(round(batch)),
        "bound": bound,
        "of_bound": figures["output_tokens_per_second"] / bound,
    }


def _step_bytes(model: optx.Compiled, batch: int, context: int) -> float:
    return sum(model.plan.bytes_per_token(batch, context).values())


def _flops() -> float:
    """FLOP/s of a product in the dtype that the device's models run in: float32 on a CPU, else bfloat16."""
    return decode.matmul_rate() if jax.default_backend() == "cpu" else timing.ceilings().bf16


def text(figures: Mapping) -> str:
    """The engine's figures, after those of the load."""
    e = EngineFigures(**figures["engine"])
    share = e.host_ms / e.step_ms
    rows = [
        ["start, s", f"{e.start_seconds:.1f}"],
        ["  weights, compile, first token", f"{e.weights_seconds:.1f} + {e.compile_seconds:.1f} + {e.first_token_seconds:.2f}"],
        ["programs compiled, after warm-up", f"{e.compiles}, {e.compiles_after_warm_up}"],
        ["steps", f"{e.steps:,}"],
        ["ms a step", f"{e.step_ms:.3g}"],
        ["  of it on the host", f"{e.host_ms:.3g} ({share:.1%})"],
        ["mean batch, context", f"{e.mean_batch:.1f}, {e.mean_context:,.0f}"],
        ["prompt tokens from the prefix cache", f"{e.prefix_hit_tokens:,}"],
        ["preemptions", f"{e.preemptions:,}"],
        [f"decode bound there, tokens/s ({e.step_bytes / 1e9:.3g} GB a step)", f"{e.decode_bound:,.0f}"],
        ["bound with prompts at full batch, tokens/s", f"{e.bound:,.0f}"],
        ["measured / bound", f"{e.of_bound:.2f}"],
    ]  # fmt: skip
    reads = (
        f"reads {e.read_bytes_per_second / 1e12:.3g} TB/s, multiplies {e.flops_per_second / 1e12:.3g} TFLOP/s, measured"
    )
    return f"{e.device}: {reads}\n{table(('engine', ''), rows)}"

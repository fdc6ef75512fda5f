"""Decode steps of the running device beside what the plan predicts, op by op, and the figures that make it predict better.

    optx bench decode --against-plan [--shape CONFIG] [--recipe NAME] [--batch 8] [--target NAME] [--store NAME] [--out FILE]
    optx bench decode --against-plan --measured FILE [--measured FILE] --store NAME      steps that earlier runs kept with --out

By default the widths of Qwen3-8B with random weights under RECIPES at BATCHES: what `--store` wants to see to tell launches,
bytes and arithmetic apart. On a GPU a step's kernels are timed one by one (CUPTI) and each goes to its op by its name; elsewhere
only whole steps are compared.
"""

import dataclasses
import datetime
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from flax import nnx

from optx import api, lower, measured
from optx import target as targets
from optx.bench import fit, profile, step, timing
from optx.cost import step_ops
from optx.errors import UsageError
from optx.measured import BETWEEN, REST, Measured, OpTime, StepTimes
from optx.predict import KERNELS, Prediction, predict, site_seconds, small_kernels, spared
from optx.recipe import Recipe
from optx.report import table
from optx.target import Target

SHAPE = "qwen3-8b"
RECIPES = ("fused", "bf16_fp8kv", "int8_kv8", "int4_kv8", "fp8_kv8")
BATCHES = (1, 8, 64)
CLOSE = 0.15  # of the measured time, that a prediction may be off


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
    """A step with what a new prediction of it needs."""

    model: str
    recipe: str
    batch: int
    context: int
    tree: nnx.Module  # on shapes, lowered
    seconds: float
    kernels: Sequence[tuple[str, float]] | None  # (name, seconds) in order; None: the device tells none

    @property
    def ops(self):
        return step_ops(self.tree, batch=self.batch, context=self.context)

    def profiled(self, target: Target) -> profile.Profile | None:
        if self.kernels is None:
            return None
        return profile.by_op(self.kernels, self.ops, lambda op: site_seconds(op, target), spared(self.tree, self.batch))


def look(
    shapes: Sequence[str],
    recipes: Sequence[Recipe],
    *,
    batches: Sequence[int],
    context: int,
    require: str | None = None,
    dtype: str | None = None,
    page_size: int = step.PAGE,
    say: Callable[[str], None] = lambda text: None,
) -> list[Seen]:
    """Times every shape under every recipe at every batch."""
    found = []
    for planned, make in step.lowered(shapes, recipes, require=require, dtype=dtype, say=say):
        tree = make()
        shapes_alone = lower.choose(planned.tree, planned.target, require)
        for batch in batches:
            run = step.stepping(tree, batch, context, page_size)
            seconds, compiled = step.timed(run)
            kernels = profile.kernels(run)
            del run
            say(f"{planned.name}, batch {batch:,}: {1e3 * seconds:.3f} ms, compiled in {compiled:.0f} s")
            found.append(
                Seen(
                    model=planned.source.origin.name,
                    recipe=planned.recipe.name,
                    batch=batch,
                    context=context,
                    tree=shapes_alone,
                    seconds=seconds,
                    kernels=kernels,
                )
            )
        del tree
    return found


def fitted(run: "Run", target: Target) -> Target:
    """The target with decode figures that predict these steps best. Raises RequestError where no kernels were timed."""
    profiles = [(each, found) for each in run.seen if (found := each.profiled(target)) is not None]
    observed = [
        fit.Observed(
            profile=found,
            rest=max(0.0, found.rest - _unnamed(each, found, target)),
            small=small_kernels(each.tree, each.batch),
            seconds=each.seconds,
        )
        for each, found in profiles
    ]
    title = f"optx bench decode --against-plan on {run.device}, {run.date}, jax {jax.__version__}"
    own = targets.Source(title=title, figures=("decode",))
    others = tuple(
        dataclasses.replace(source, figures=tuple(figure for figure in source.figures if figure != "decode"))
        for source in target.sources
    )
    return dataclasses.replace(target, decode=fit.fit(observed, target), sources=(*others, own))


def _unnamed(seen: Seen, found: profile.Profile, target: Target) -> float:
    """Bound of ops that run in kernels of XLA's, whose names do not tell."""
    return sum(op.seconds(target) for op in seen.ops if KERNELS[op.op] and (op.op, op.format) not in found.seconds)


def compare(seen: Seen, target: Target) -> StepTimes:
    """target: one whose bandwidth is known."""
    predicted = predict(seen.tree, seen.ops, target, batch=seen.batch)
    found = seen.profiled(target)
    return StepTimes(
        model=seen.model,
        recipe=seen.recipe,
        batch=seen.batch,
        context=seen.context,
        bound_seconds=sum(part.bound for part in predicted.parts),
        predicted_seconds=predicted.seconds,
        measured_seconds=seen.seconds,
        ops=_ops(predicted, found, seen.seconds),
        kernels=seen.kernels or (),
    )


def _ops(predicted: Prediction, found: profile.Profile | None, seconds: float) -> tuple[OpTime, ...]:
    ops = [
        OpTime(
            op=part.op,
            format=part.format,
            kernels=KERNELS[part.op] * part.sites,
            bytes=part.bytes,
            bound_seconds=part.bound,
            predicted_seconds=part.seconds,
            measured_seconds=found and found.seconds.get((part.op, part.format)),
        )
        for part in predicted.parts
        if KERNELS[part.op]
    ]
    along = [part for part in predicted.parts if not KERNELS[part.op]]  # vectors: read by the small kernels
    rest = OpTime(
        op=REST,
        format="",
        kernels=predicted.small,
        bytes=sum(part.bytes for part in along),
        bound_seconds=sum(part.bound for part in along),
        predicted_seconds=predicted.rest + sum(part.seconds for part in along),
        measured_seconds=found and found.rest,
    )
    between = OpTime(
        op=BETWEEN,
        format="",
        kernels=0,
        bytes=0,
        bound_seconds=0,
        predicted_seconds=predicted.between,
        measured_seconds=found and max(0.0, seconds - found.total),
    )
    return (*ops, rest, between)


def remembered(found: Measured) -> list[Seen]:
    """The steps of an earlier run, on shapes again.

    Raises: UsageError or RecipeError for a shape or recipe that does not ship with optx, LoweringError for a device that is not
    in the table.
    """
    kind = targets.named(found.device) or found.device
    plans: dict[tuple[str, str], nnx.Module] = {}
    for one in found.steps:
        if (one.model, one.recipe) not in plans:
            planned = api.plan(step.source(one.model), Recipe.from_yaml(one.recipe), kind)
            plans[one.model, one.recipe] = lower.choose(planned.tree, planned.target)
    return [
        Seen(
            model=one.model,
            recipe=one.recipe,
            batch=one.batch,
            context=one.context,
            tree=plans[one.model, one.recipe],
            seconds=one.measured_seconds,
            kernels=[(name, seconds) for name, seconds in one.kernels] or None,
        )
        for one in found.steps
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Steps of one device: timed now, or read from files."""

    device: str
    date: str
    seen: Sequence[Seen]


def _run(flags, say: Callable[[str], None]) -> Run:
    names = [flags["recipe"]] if flags["recipe"] else RECIPES
    seen = look(
        flags["shape"] or (SHAPE,),
        [Recipe.from_yaml(name) for name in names],
        batches=flags["batch"] or BATCHES,
        context=flags["context"] or step.CONTEXT,
        require=flags["require"],
        say=say,
    )
    return Run(device=jax.devices()[0].device_kind, date=str(datetime.date.today()), seen=seen)


def _files(flags) -> Run:
    """Raises UsageError for flags that say what to run, and for files of several devices."""
    wrong = next((name for name in ("shape", "recipe", "batch", "context", "require") if flags[name]), None)
    if wrong:
        raise UsageError(f"bench decode: --{wrong} says nothing beside --measured, which has steps of its own")
    files = [measured.read(Path(name)) for name in flags["measured"]]
    devices = list(dict.fromkeys(each.device for each in files))
    if len(devices) > 1:
        raise UsageError(
            f"bench decode: --measured files are of several devices: {', '.join(devices)}; fit one at a time"
        )
    seen = [each for found in files for each in remembered(found)]
    return Run(device=devices[0], date=max(each.date for each in files), seen=seen)


def bench(flags, say: Callable[[str], None]) -> tuple[dict, str]:
    """What `optx bench decode --against-plan` does with its flags: (JSON, text)."""
    if flags["store"]:  # before the work, not after
        targets.check_name(flags["store"])
        if not (flags["measured"] or profile.available()):
            raise UsageError(
                f"--store: {jax.devices()[0].device_kind} does not tell the times of kernels; run it on an NVIDIA GPU"
            )
    target = targets.get(flags["target"]) if flags["target"] else None  # a wrong name is told before the work
    run = _files(flags) if flags["measured"] else _run(flags, say)
    target = _with_bandwidth(target or targets.get(targets.named(run.device) or "auto"))
    stored = None
    if flags["store"]:
        target = fitted(run, target)
        stored = str(fit.store(flags["store"], target.decode, run.device, target.source("decode")))
    found = Measured(
        device=run.device,
        date=run.date,
        target=target.name,
        source=target.source("decode").title if target.decode and target.source("decode") else None,
        steps=tuple(compare(each, target) for each in run.seen),
        decode=target.decode and fit.row(target.decode),
    )
    shown = text(found)
    if stored:
        shown += f"\nstored in {stored}; try: optx plan {SHAPE} --target {flags['store']}"
    return found.to_dict(), shown


def _with_bandwidth(target: Target) -> Target:
    """A device whose bandwidth is not in the table is taken to read as fast as it does in this run."""
    if target.bandwidth:
        return target
    read = targets.Source(title="read in this run", figures=("bandwidth",))
    return dataclasses.replace(target, bandwidth=timing.read_ceiling(), sources=(*target.sources, read))


OPS_HEADER = ("op", "stored as", "kernels", "MB", "bound, us", "predicted, us", "measured, us", "predicted / measured")
TOTALS_HEADER = ("step", "batch", "bound, ms", "predicted, ms", "measured, ms", "predicted / measured")


def text(found: Measured) -> str:
    how = (
        f"efficiencies: {found.source}"
        if found.source
        else "its bounds alone: no efficiencies of its kernels are stored"
    )
    parts = [f"{found.device}, {found.date}; predicted for {found.target} from {how}"]
    if any(op.measured_seconds is not None for each in found.steps for op in each.ops):
        parts += [_ops_text(each) for each in found.steps]
    else:
        parts += [f"whole steps only: {found.device} does not tell the times of kernels (CUPTI does, on NVIDIA GPUs)"]
    rows = [
        [f"{s.model} + {s.recipe}", f"{s.batch:,}", _ms(s.bound_seconds), _ms(s.predicted_seconds),
         _ms(s.measured_seconds), f"{s.ratio:.3f}"]
        for s in found.steps
    ]  # fmt: skip
    worst = max(found.steps, key=lambda s: abs(s.ratio - 1))
    close = sum(abs(s.ratio - 1) <= CLOSE for s in found.steps)
    parts += [
        f"whole steps, a token for each of `batch` sequences of {worst.context:,} tokens\n{table(TOTALS_HEADER, rows)}",
        f"within {CLOSE:.0%} of measured: {close} of {len(found.steps)}; the farthest off is {worst.recipe} at batch "
        f"{worst.batch:,}, {abs(worst.ratio - 1):.1%} {'above' if worst.ratio > 1 else 'below'}",
    ]
    return "\n\n".join(parts)


def _ops_text(s: StepTimes) -> str:
    rows = [
        [op.op, op.format, f"{op.kernels:,}" if op.kernels else "", f"{op.bytes / 1e6:,.1f}", _us(op.bound_seconds),
         _us(op.predicted_seconds), _us(op.measured_seconds), "-" if op.ratio is None else f"{op.ratio:.3f}"]
        for op in s.ops
    ]  # fmt: skip
    total = ["whole step", "", "", f"{sum(op.bytes for op in s.ops) / 1e6:,.1f}", _us(s.bound_seconds),
             _us(s.predicted_seconds), _us(s.measured_seconds), f"{s.ratio:.3f}"]  # fmt: skip
    return f"{s.model} + {s.recipe}, batch {s.batch:,}\n{table(OPS_HEADER, [*rows, total])}"


def _us(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e6 * seconds:,.1f}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.4g}"

"""Recipes over models: bytes, predicted time and quality of every pair, each kept in a file as soon as it is known.

A result's file is named by a hash of all that determines it, so that a run that was killed goes on where it stopped, and a second
one computes what is new alone. A model is loaded once; its uncompiled form scores every window once; a variant starts from
the passes that it shares with the one compiled before it.
"""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import optx
from optx import api, heal, heal_data, ir, kept, lower, pipeline, tensor
from optx import target as targets
from optx.ablate_config import ModelRow, Study, content, for_model
from optx.ablate_table import UNCOMPILED, Result
from optx.checkpoint.source import Source
from optx.cost import step_bytes
from optx.errors import (
    FormatError,
    HealError,
    LegalityError,
    LoweringError,
    PassError,
    QualityError,
    RecipeError,
    RequestError,
    VerifyError,
)
from optx.evaluate import Evaluation, evaluate
from optx.pipeline import Record
from optx.recipe import Recipe
from optx.registry import Stage
from optx.report import record_dict

# What says that a recipe does not go with a model; any other error ends the run.
REFUSALS = (RecipeError, PassError, LegalityError, VerifyError, FormatError, LoweringError, QualityError, HealError)
KEPT = 2 << 30  # bytes of the uncompiled model's logits that are kept; windows beyond it are computed for every variant
NONE = Recipe(name=UNCOMPILED)

Say = Callable[[str], None]


def run(study: Study, out: Path, *, fresh: bool = False, progress: bool = False, say: Say = print) -> list[Result]:
    """Results of every model: the uncompiled one, then its variants in the study's order; kept in `out`/results.

    fresh: nothing kept is used. say: is told of each result as it comes.
    Raises: CheckpointError for a model that cannot be had, RequestError for a text that it cannot score. A recipe that a model
    refuses is a result with its reason.
    """
    folder = Path(out) / "results"
    folder.mkdir(parents=True, exist_ok=True)
    sources = [api.load(row.model, row.weights, row.dtype) for row in study.models]
    labels = _labels(study.models, sources)
    jobs = [
        Job(label=label, recipe=(mine := for_model(row, recipe)), inputs=inputs(study, row, source, mine))
        for row, source, label in zip(study.models, sources, labels)
        for recipe in (NONE, *study.variants)
    ]
    known = {} if fresh else {job.key: result for job in jobs if (result := job.read(folder)) is not None}
    if known:
        say(f"{len(known)} of {len(jobs)} results kept from an earlier run, {folder}")
    done = 0
    for source, label in zip(sources, labels):
        missing = [job for job in jobs if job.label == label and job.key not in known]
        for job, result in _computed(source, study, missing, progress):
            job.write(folder, result)
            known[job.key] = result
            done += 1
            say(f"[{done}/{len(jobs) - len(known) + done}] {label}, {result.line()}")
    return [job.named(known[job.key]) for job in jobs]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One result to be had."""

    label: str  # of the model
    recipe: Recipe
    inputs: Mapping[str, Any]  # all that determines the result

    @functools.cached_property
    def key(self) -> str:
        return kept.key(self.inputs)

    def read(self, folder: Path) -> Result | None:
        """A result kept earlier; a file that is damaged counts as none."""
        return kept.read(folder, self.key, Result)

    def write(self, folder: Path, result: Result) -> None:
        """The file appears whole or not at all."""
        kept.write(folder, self.key, result, self.inputs)

    def named(self, result: Result) -> Result:
        """With the names of now: neither the model's nor the recipe's decides a result."""
        return dataclasses.replace(result, model=self.label, variant=self.recipe.name, key=self.key)


def inputs(study: Study, row: ModelRow, source: Source, recipe: Recipe) -> dict:
    """All that determines a result: files, recipe, text and protocol, target, versions, device."""
    target = dataclasses.asdict(study.target)
    healed = (
        {"healed on": [each for options in recipe.heal for each in heal_data.digests(options)]} if recipe.heal else {}
    )
    return healed | {
        "versions": {"optx": optx.__version__, "jax": jax.__version__},
        "device": jax.devices()[0].device_kind,
        "model": {"files": kept.model_files(row.model), "origin": source.origin.name, "bytes": source.origin.bytes},
        "form": [row.weights, source.origin.dtype],
        "recipe": content(recipe),
        "text": kept.digest(study.text),
        "calibration": [kept.digest(study.calibration or ""), study.measured] if _reads_text(study, recipe) else None,
        "windows": [study.context, study.stride, study.max_windows],
        "target": {name: value for name, value in target.items() if name != "sources"},
        "decode_context": study.decode_context,
    }


def _reads_text(study: Study, recipe: Recipe) -> bool:
    """Whether the calibration text has a part in compiling the recipe."""
    lossy = any(not pass_.exact for pass_, _ in recipe.steps())
    calibrated = any(pipeline.needs(rules) or any(o.unresolved for _, o in rules) for _, rules in recipe.steps())
    return calibrated or recipe.max_kl is not None or (study.measured and lossy)


def _labels(rows: Sequence[ModelRow], sources: Sequence[Source]) -> list[str]:
    """A name for each model: the one given, or the checkpoint's, with its form where two would be called alike."""
    names = [row.name or source.origin.name for row, source in zip(rows, sources)]
    forms = [f"{row.model} ({row.weights}, {source.origin.dtype})" for row, source in zip(rows, sources)]
    labels = [form if names.count(name) > 1 else name for name, form in zip(names, forms)]
    for label in labels:
        if labels.count(label) > 1:
            raise RecipeError(f"ablation.models: {label} is listed twice")
    return labels


def _computed(source: Source, study: Study, jobs: Sequence[Job], progress: bool) -> Iterator[tuple[Job, Result]]:
    """Results of one model, those beside each other that share their first passes."""
    if not jobs:
        return
    bench = Workbench(source, study, progress)
    for job in sorted(jobs, key=lambda job: _steps(job.recipe)):
        if job.recipe is NONE:
            yield job, bench.uncompiled()
        else:
            yield job, bench.result(job.recipe)


def _steps(recipe: Recipe) -> list[str]:
    """What each pass of a recipe is run with; equal beginnings give equal trees."""
    return [repr((pass_.name, [options for _, options in rules])) for pass_, rules in recipe.steps()]


class Workbench:
    """One model with its weights, its uncompiled form as the reference of all variants."""

    def __init__(self, source: Source, study: Study, progress: bool):
        tree = source.load()
        values = {path: variable.get_value() for path, variable in ir.params(tree).items()}
        self.study, self.progress = study, progress
        self.source = dataclasses.replace(source, read=values.__getitem__)
        self.stages = Stages(self.source)
        compiled, self.compiled_in = self.stages.compile(api.plan(self.source, NONE))
        self.reference, start = Remembered(compiled), time.perf_counter()
        self.found = self._evaluate(self.reference)
        self.evaluated_in = time.perf_counter() - start

    def uncompiled(self) -> Result:
        figures = self._figures(api.plan(self.source, NONE, self.study.target))
        found = dataclasses.replace(self.found, kl=0.0, top1=1.0)
        return _result(NONE, figures, found, self.compiled_in, self.evaluated_in)

    def result(self, recipe: Recipe) -> Result:
        """Bytes, time and quality of a variant, or the reason for which it was refused."""
        try:
            planned = api.plan(self.source, recipe, self.study.target)
            compiled, seconds = self._compile(dataclasses.replace(planned, target=targets.get("auto")))
            start = time.perf_counter()
            found = self._evaluate(compiled)
        except REFUSALS as error:
            return _refused(recipe, f"{type(error).__name__}: {error}")
        if not math.isfinite(found.kl):
            return _refused(recipe, f"its logits are no numbers: KL {found.kl}")
        passes = tuple(record_dict(record) for record in compiled.plan.records)
        return _result(recipe, self._figures(planned), found, seconds, time.perf_counter() - start, passes)

    def _compile(self, planned: api.Plan) -> tuple[api.Compiled, float]:
        recipe, study, start = planned.recipe, self.study, time.perf_counter()
        if not _reads_text(study, recipe):
            return self.stages.compile(planned)
        text, measured = study.calibration, study.measured or recipe.max_kl is not None
        how = {"calibration": text, "measured": measured, "progress": self.progress}
        return api.compile(self.source, recipe, planned.target, **how), time.perf_counter() - start

    def _evaluate(self, model) -> Evaluation:
        study, against = self.study, None if model is self.reference else self.reference
        windows = {"context": study.context, "stride": study.stride, "max_windows": study.max_windows}
        return evaluate(model, study.text, **windows, against=against, progress=self.progress)

    def _figures(self, planned: api.Plan) -> dict:
        """What shapes alone tell, of the plan for the study's target."""
        tree, context = planned.tree, self.study.decode_context
        step = step_bytes(tree, 1, context)
        bounds = planned.estimate(1, context)
        return {
            "bits": 8 * ir.weight_bytes(tree) / ir.weight_count(tree),
            "layer_bits": layer_bits(tree),
            "weight_bytes": ir.weight_bytes(tree),
            "kv_bytes_per_token": step.kv_token,
            "bytes_per_token": step.total,
            "ms_bound": None if bounds.tpot is None else 1e3 * bounds.tpot,
            "ms_predicted": None if bounds.predicted is None else 1e3 * bounds.predicted.seconds,
        }


def layer_bits(tree) -> float | None:
    """Stored bits a weight of the layers' matrices, scales and zero points included; embedding, head and vectors are not
    counted. None for a tree without such."""
    distinct = {id(v): v.get_raw_value() for path, v in ir.params(tree).items() if path.startswith("layers/")}
    matrices = [value for value in distinct.values() if len(value.shape) > 1]
    count = sum(math.prod(value.shape) for value in matrices)
    return 8 * sum(map(tensor.nbytes, matrices)) / count if count else None


def _refused(recipe: Recipe, why: str) -> Result:
    return Result(variant=recipe.name, recipe=recipe.to_dict(), refused=why)


def _result(recipe, figures: dict, found: Evaluation, compiled_in: float, evaluated_in: float, passes=()) -> Result:
    return Result(
        variant=recipe.name,
        recipe=recipe.to_dict(),
        **figures,
        perplexity=found.perplexity,
        kl=found.kl,
        top1=found.top1,
        windows=found.windows,
        tokens=found.tokens,
        compile_seconds=compiled_in,
        eval_seconds=evaluated_in,
        passes=passes,
    )


class Stages:
    """Trees of one model after each pass of the variant compiled last, from which the next goes on where the two part."""

    def __init__(self, source: Source):
        self.source = source
        self.steps: list[str] = []
        self.records: list[Record] = []
        self.seconds: list[float] = []
        self.trees = [source.load()]

    def compile(self, planned: api.Plan) -> tuple[api.Compiled, float]:
        """What `optx.compile` gives without calibration, and its seconds: those of a pass that ran before are of that run."""
        steps, start = _steps(planned.recipe), time.perf_counter()
        heal.check_planned(planned)
        shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(steps, self.steps)))
        del self.steps[shared:], self.records[shared:], self.seconds[shared:], self.trees[shared + 1 :]
        reused = sum(self.seconds)
        for record, old in zip(planned.records, self.records):
            record.seconds, record.errors, record.healing = old.seconds, old.errors, old.healing
        for i in range(shared, len(steps)):
            began = time.perf_counter()
            self.trees.append(self._applied(planned, i))
            self.seconds.append(time.perf_counter() - began)
            self.steps.append(steps[i])
            self.records.append(planned.records[i])
        tree = ir.shallow(planned.tree)
        for prefix in self.source.segments():
            ir.put(tree, prefix, lower.lower(ir.get(self.trees[-1], prefix), planned.target, planned.recipe.require))
        return api.Compiled(tree, planned), time.perf_counter() - start + reused

    def _applied(self, planned: api.Plan, i: int):
        step, record, plan = planned.recipe.steps()[i], planned.records[i], planned.trees[i + 1]
        if step[0].stage == Stage.HEAL:
            return heal.applied(self.source, self.trees[0], self.trees[-1], step, record)
        tree = ir.shallow(plan)
        for prefix in self.source.segments():
            block, _ = pipeline.apply_pass(ir.get(self.trees[-1], prefix), prefix, step, plan, record)
            ir.put(tree, prefix, block)
        return tree


class Remembered:
    """A compiled model as `evaluate` takes one, which computes the logits of a window once: they stay in the host's memory."""

    def __init__(self, compiled: api.Compiled):
        self.program, self.tokenizer = self, compiled.tokenizer
        self.leaves, self.vocab, self.plan = compiled.program.leaves, compiled.vocab, compiled.program.plan
        self.context = compiled.program.context
        self._forward = compiled.program.forward
        self._kept: dict[tuple[bytes, int], np.ndarray] = {}

    def forward(self, leaves, tokens, counts):
        """As `Program.forward`: float32[1, T, V]."""
        key = np.asarray(tokens).tobytes(), int(counts[0])
        if key in self._kept:
            return self._kept[key]
        logits = np.asarray(self._forward(leaves, tokens, counts))
        if sum(one.nbytes for one in self._kept.values()) + logits.nbytes <= KEPT:
            self._kept[key] = logits
        return logits


def check_strict(results: Sequence[Result]) -> None:
    """Raises RequestError where a variant was refused."""
    refused = [result for result in results if result.refused is not None]
    if refused:
        names = ", ".join(f"{result.model} {result.variant!r}" for result in refused)
        raise RequestError(f"ablate: {len(refused)} of {len(results)} refused: {names}; the table says why")

"""What a report shows, as numbers: the subject, maps of its layers, its kernels, and all of it as JSON.

`optx report --json` prints `figures`. Bytes are of one decode step of `batch` sequences of `context` tokens, times in seconds:

    title, model, recipe, target, timed, batch, context      what the report is of; timed: passes ran on weights
    steps       bytes of the step before the first pass and after each: StepBytes
    passes      each pass as in `optx compile --json`, with `errors` by weight
    estimate    bounds, prediction, sums by op and by layer: Estimate
    roofline    decode, prefill: `roofs` (bandwidth, peak by dtype) and `dots` (ops of one cost)
    maps        bytes, error, output: a row for each part, a value for each layer (null: it has no such part)
    kernels     what runs each op, how often, and who declined why
    measured    steps of --measured as predicted and as measured, by op: StepTimes without its kernels
    yaml, provenance, sources      the recipe's text, where model and figures come from
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from flax import nnx

from optx import ir, lower
from optx.cost import OpCost, step_bytes
from optx.estimate import estimate
from optx.measured import StepTimes
from optx.pallas.dispatch import OpChoice
from optx.pipeline import Record
from optx.recipe import Recipe
from optx.report import Report, record_dict
from optx.roofline import Plot, roofline
from optx.target import Target

VECTORS = "norms, biases"  # all parts of a layer that multiply nothing, as one row of a map


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """What a report is about."""

    model: str
    recipe: Recipe
    target: Target
    trees: tuple[nnx.Module, ...]  # abstract: before the first pass, after each
    records: tuple[Record, ...]
    timed: bool  # the records hold a compile's times and errors; False: of a run on shapes
    file_bytes: int  # of the checkpoint; 0: none, or not known
    provenance: tuple[tuple[str, str], ...]  # (label, value)

    @property
    def title(self) -> str:
        return f"{self.model} + {self.recipe.name}" if self.records else self.model

    @functools.cached_property
    def chosen(self) -> nnx.Module:
        """The result with the kernels that the target would run. Raises LoweringError when there is none for a call."""
        return lower.choose(self.trees[-1], self.target, self.recipe.require)

    @property
    def report(self) -> Report:
        """As text."""
        return Report(
            model=self.model,
            recipe=self.recipe.name,
            target=self.target.name,
            records=self.records,
            weight_bytes=ir.weight_bytes(self.trees[-1]),
            cache_bytes=self.trees[-1].cache_plan().unit_bytes,
            file_bytes=self.file_bytes,
            kernels=lower.explain(self.chosen),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerMap:
    """A figure by part and layer."""

    name: str
    title: str
    parts: tuple[str, ...]
    layers: range
    values: Mapping[tuple[str, int], float]  # by (part, layer), where a layer has the part
    least: float  # where the scale begins: zero, or the smallest value, which shows what differs little
    most: float

    def row(self, part: str) -> list[float | None]:
        return [self.values.get((part, layer)) for layer in self.layers]

    def share(self, value: float) -> float:
        """Its place on the scale, 0 to 1."""
        return (value - self.least) / (self.most - self.least) if self.most > self.least else 1.0


def layer_maps(ops: Sequence[OpCost], records: Sequence[Record]) -> list[LayerMap]:
    """Bytes; the largest error of a weight over the passes; that of a site's output where the compile measured it."""
    weights = [record.errors for record in records]
    outputs = [record.quality.errors for record in records if record.quality]
    found = [
        _map("bytes", "Bytes of a decode step", _bytes(ops), from_zero=True),
        _map("error", "Relative error of the weights, |W\u2032 \u2212 W| / |W|", _largest(weights)),
        _map(
            "output",
            "Relative error of the sites' outputs on calibration text, |y\u2032 \u2212 y| / |y|",
            _largest(outputs),
        ),
    ]
    return [each for each in found if each.values]


def _bytes(ops: Sequence[OpCost]) -> dict[tuple[str, int], float]:
    cells: dict[tuple[str, int], float] = {}
    for op in ops:
        if op.layer is not None:
            inner = re.sub(r"^layers/\d+/?", "", op.path)
            row = VECTORS if op.op == "vectors" else f"{inner} ({op.op})" if op.cache or op.written else inner
            cells[row, op.layer] = cells.get((row, op.layer), 0) + op.bytes
    return cells


def _largest(errors: Sequence[Mapping[str, float]]) -> dict[tuple[str, int], float]:
    cells: dict[tuple[str, int], float] = {}
    for path, error in (item for found in errors for item in found.items()):
        if match := re.match(r"layers/(\d+)/(.*?)(/weight)?$", path):
            place = match[2], int(match[1])
            cells[place] = max(cells.get(place, 0), error)
    return cells


def _map(name: str, title: str, cells: Mapping[tuple[str, int], float], *, from_zero: bool = False) -> LayerMap:
    parts = sorted(dict.fromkeys(part for part, _ in cells), key=lambda part: (part == VECTORS, part))
    return LayerMap(
        name=name,
        title=title,
        parts=tuple(parts),
        layers=range(max((layer for _, layer in cells), default=-1) + 1),
        values=cells,
        least=0.0 if from_zero else min(cells.values(), default=0.0),
        most=max(cells.values(), default=0.0),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelRow:
    """Call sites that one kernel runs for the same reasons."""

    choice: OpChoice
    sites: int
    first: str  # path
    declined: list[tuple[list[str], str]]  # (rows of the table, their reason)


def kernels(tree: nnx.Module) -> list[KernelRow]:
    """Of a lowered tree."""
    groups: dict[OpChoice, list[str]] = {}
    for path, choice in lower.choices(tree):
        groups.setdefault(choice, []).append(path)
    return [
        KernelRow(choice=choice, sites=len(paths), first=paths[0], declined=_by_reason(choice.declined))
        for choice, paths in sorted(groups.items(), key=lambda item: item[0].op)
    ]


def _by_reason(declined: Sequence[tuple[str, str]]) -> list[tuple[list[str], str]]:
    """Rows of one reason together, reasons in the order of the table."""
    rows: dict[str, list[str]] = {}
    for name, reason in declined:
        rows.setdefault(reason, []).append(name)
    return [(names, reason) for reason, names in rows.items()]


def figures(
    subject: Subject, *, batch: int = 1, context: int | None = None, measured: Sequence[StepTimes] = ()
) -> dict:
    """All that the page shows as plain data; keys at the top of this file.

    Raises: LoweringError when no kernel takes a call on the target.
    """
    context = context or subject.trees[-1].context
    bounds = estimate(subject.trees[-1], subject.target, batch=batch, context=context)
    return {
        "title": subject.title,
        "model": subject.model,
        "recipe": subject.recipe.name,
        "target": subject.target.name,
        "timed": subject.timed,
        "batch": batch,
        "context": context,
        "steps": [step_bytes(tree, batch, context).to_dict() for tree in subject.trees],
        "passes": [record_dict(record) | {"errors": dict(record.errors)} for record in subject.records],
        "estimate": bounds.to_dict(),
        "roofline": {
            name: _roofline(roofline(step.ops, subject.target), subject.target)
            for name, step in (("decode", bounds.decode), ("prefill", bounds.prefill))
        },
        "maps": {each.name: _layer_map(each) for each in layer_maps(bounds.decode.ops, subject.records)},
        "kernels": [_kernel(row) for row in kernels(subject.chosen)],
        "measured": [_measured(step) for step in measured],
        "yaml": subject.recipe.to_yaml(),
        "provenance": dict(subject.provenance),
        "sources": [dataclasses.asdict(source) for source in subject.target.sources],
    }


def _roofline(plot: Plot | None, target: Target) -> dict | None:
    if plot is None:
        return None
    kept = ("op", "format", "sites", "first", "intensity", "rate", "seconds", "share", "binds")
    return {
        "roofs": [{"dtype": r.dtype, "bandwidth": target.bandwidth, "peak": r.peak} for r in plot.roofs],
        "dots": [{name: getattr(dot, name) for name in kept} for dot in plot.dots],
    }


def _layer_map(found: LayerMap) -> dict:
    rows = [{"part": part, "values": found.row(part)} for part in found.parts]
    return {"title": found.title, "least": found.least, "most": found.most, "rows": rows}


def _kernel(row: KernelRow) -> dict[str, Any]:
    return {
        "op": row.choice.op,
        "kernel": str(row.choice),
        "note": row.choice.note,
        "sites": row.sites,
        "first": row.first,
        "declined": [{"rows": names, "reason": reason} for names, reason in row.declined],
    }


def _measured(step: StepTimes) -> dict:
    ops = [dataclasses.asdict(op) | {"ratio": op.ratio} for op in step.ops]
    return {**dataclasses.asdict(step), "ratio": step.ratio, "ops": ops} | {"kernels": len(step.kernels)}

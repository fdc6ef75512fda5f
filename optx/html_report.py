"""What a compile or a plan did as one HTML page that needs nothing beside it: no network, no script to read it.

Passes as steps, bytes of a decode step by pass, a roofline with every op, bytes and errors by layer, kernels with the
reasons of those that declined, recipe and provenance. `html_report.html` beside this file is its template.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from flax import nnx

from optx import ir, lower
from optx.cost import OpCost, StepBytes, step_bytes
from optx.estimate import Estimate, by_op, estimate
from optx.pallas.dispatch import OpChoice
from optx.pipeline import Record, flat_errors
from optx.recipe import Recipe
from optx.report import Report
from optx.roofline import roofline
from optx.target import Target

DIFF_LINES = 120  # of a pass that are shown
VECTORS = "norms, biases"  # all parts of a layer that multiply nothing, as one row of the heat map


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
            cache_bytes=self.trees[-1].cache_plan().bytes(1, 1),
            file_bytes=self.file_bytes,
            kernels=lower.explain(self.chosen),
        )


def page(subject: Subject, *, batch: int = 1, context: int | None = None) -> str:
    """The whole page. batch sequences of `context` tokens (None: the model's context) are decoded in its figures.

    Raises: LoweringError when no kernel takes a call on the target.
    """
    context = context or subject.trees[-1].context
    steps = [step_bytes(tree, batch, context) for tree in subject.trees]
    bounds = estimate(subject.trees[-1], subject.target, batch=batch, context=context)
    return _template().render(
        subject=subject,
        batch=batch,
        context=context,
        tiles=_tiles(subject, steps, bounds),
        steps=[_pass(subject, *row) for row in zip(subject.records, steps, steps[1:])],
        first=steps[0],
        last=steps[-1],
        waterfall=_waterfall(subject.records, steps),
        rooflines=_rooflines(bounds),
        lacks=_lacks(subject.target),
        maps=[found for found in (_byte_map(bounds.decode.ops), *_error_maps(subject.records)) if found],
        outside=[(op.path, op.op, ir.size_text(op.bytes)) for op in bounds.decode.ops if op.layer is None],
        kernels=_kernels(subject.chosen),
        recipe=subject.recipe.to_yaml(),
        sources=subject.target.sources,
    )


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "size": ir.size_text,
        "time": time_text,
        "operations": operations_text,
        "percent": percent_text,
    }
    return environment.get_template("html_report.html")


def time_text(seconds: float | None) -> str:
    """`2.39 ms`; `not known` for None."""
    if seconds is None:
        return "not known"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def percent_text(share: float) -> str:
    return f"{100 * share:.2f} %"


def operations_text(flops: float) -> str:
    """`13.9 GFLOP`."""
    for unit, size in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6), ("kFLOP", 1e3)):
        if flops >= size:
            return f"{flops / size:,.4g} {unit}"
    return f"{flops:.0f} FLOP"


def _tiles(subject: Subject, steps: Sequence[StepBytes], bounds: Estimate) -> list[tuple[str, str, str]]:
    """(label, figure, note) of what matters most."""
    first, last = steps[0], steps[-1]
    ratio = f"{first.total / last.total:.2f}× fewer than the {ir.size_text(first.total)} of the input"
    speed = "" if bounds.tokens_per_second is None else f"at most {bounds.tokens_per_second:,.0f} tokens/s"
    memory = "" if not subject.target.memory else f"{subject.target} has {ir.size_text(subject.target.memory)}"
    tiles = [
        ("Bytes a decode step", ir.size_text(last.total), ratio if first.total > last.total else "as the input"),
        ("Time a decode step, at least", time_text(bounds.tpot), speed or f"no bandwidth is known of {subject.target}"),
        ("Memory", ir.size_text(last.held), memory if last.held <= (subject.target.memory or last.held)
         else f"does not fit: {memory}"),
        ("KV a token", f"{last.kv_token:,.0f} B", f"{first.kv_token:,.0f} B in the input"),
    ]  # fmt: skip
    errors = [error for record in subject.records if (error := flat_errors(record))]
    qualities = [record.quality for record in subject.records if record.quality]
    if qualities:
        top1 = f"top-1 as the input's on {100 * qualities[-1].top1:.2f} % of {qualities[-1].tokens:,} tokens"
        tiles.append(("KL from the input", f"{qualities[-1].kl:.3g} nats", f"a token; {top1}"))
    if errors:
        worst = max(largest for _, largest in errors)
        tiles.append(("Largest weight error", percent_text(worst), "of a matrix's norm"))
    return tiles


def _pass(subject: Subject, record: Record, old: StepBytes, new: StepBytes) -> dict[str, Any]:
    error, diff = flat_errors(record), record.diff.splitlines()
    unknown = subject.timed and not (error or record.quality)
    reasons: dict[str, int] = {}
    for reason in record.skipped.values():
        reasons[reason] = reasons.get(reason, 0) + 1
    return {
        "record": record,
        "old": old,
        "new": new,
        "weights": record.weight_bytes,
        "kv": (old.kv_token, new.kv_token),
        "error": error,
        "exactness": "exact" if record.exact else "lossy, not measured" if unknown else "lossy",
        "skipped": reasons,
        "seconds": record.seconds if subject.timed else None,
        "diff": diff[:DIFF_LINES],
        "more": max(0, len(diff) - DIFF_LINES),
    }


def _waterfall(records: Sequence[Record], steps: Sequence[StepBytes]) -> list[dict[str, Any]]:
    """Bars as (kind, start, width) in per cent of the most bytes: whole steps in their parts, passes as what they change."""
    most = max(step.total for step in steps)

    def whole(name: str, step: StepBytes) -> dict[str, Any]:
        weights, kv = 100 * step.weights / most, 100 * step.kv / most
        text = f"{ir.size_text(step.total)}: {ir.size_text(step.weights)} weights, {ir.size_text(step.kv)} KV"
        return {"name": name, "bars": [("weights", 0, weights), ("kv", weights, kv)], "text": text}

    rows = [whole("input", steps[0])]
    for record, old, new in zip(records, steps, steps[1:]):
        change = new.total - old.total
        low, width = 100 * min(old.total, new.total) / most, 100 * abs(change) / most
        parts = [("weights", new.weights - old.weights), ("KV", new.kv - old.kv)]
        said = ", ".join(f"{name} {_signed(value)}" for name, value in parts if abs(value) >= 1)
        kind = "more" if change > 0 else "less"
        rows.append({"name": record.name, "bars": [(kind, low, width)], "text": said or "as many bytes as before"})
    return [*rows, whole("result", steps[-1])] if records else rows


def _signed(change: float) -> str:
    return ("−" if change < 0 else "+") + ir.size_text(abs(change))


def _rooflines(bounds: Estimate) -> list[dict[str, Any]]:
    """Decode and prefill, each a plot and its table; without a bandwidth the tables alone."""
    found = []
    for name, step in (("decode", bounds.decode), ("prefill", bounds.prefill)):
        plot = roofline(step.ops, bounds.target)
        groups = [
            group | {"bytes": ir.size_text(group["bytes"]), "time": time_text(group["seconds"])}
            for group in by_op(step)
        ]
        found.append({"name": name, "plot": plot, "groups": groups, "seconds": step.seconds, "binds": step.binds})
    return found


def _lacks(target: Target) -> str:
    if target.bandwidth:
        return ""
    return (
        f"No memory bandwidth is known of {target}, so there is no roof to draw: "
        "--target h100 draws that of another device, optx bench ceilings --store NAME measures this one's."
    )


def _byte_map(ops: Sequence[OpCost]) -> dict[str, Any] | None:
    cells: dict[tuple[str, int], float] = {}
    for op in ops:
        if op.layer is not None:
            inner = re.sub(r"^layers/\d+/?", "", op.path)
            row = VECTORS if op.op == "vectors" else f"{inner} ({op.op})" if op.cache or op.written else inner
            cells[row, op.layer] = cells.get((row, op.layer), 0) + op.bytes
    return _heat("bytes", "Bytes of a decode step", cells, ir.size_text, from_zero=True)


def _error_maps(records: Sequence[Record]) -> list[dict[str, Any] | None]:
    """The largest error of a weight over the passes, and of a site's output where the compile measured it."""
    weights = [record.errors for record in records]
    outputs = [record.quality.errors for record in records if record.quality]
    return [
        _heat(name, title, _largest(errors), percent_text, from_zero=False)
        for name, title, errors in (
            ("error", "Relative error of the weights, |W′ − W| / |W|", weights),
            ("output", "Relative error of the sites' outputs on calibration text, |y′ − y| / |y|", outputs),
        )
    ]


def _largest(errors: Sequence[Mapping[str, float]]) -> dict[tuple[str, int], float]:
    cells: dict[tuple[str, int], float] = {}
    for path, error in (item for found in errors for item in found.items()):
        if match := re.match(r"layers/(\d+)/(.*?)(/weight)?$", path):
            place = match[2], int(match[1])
            cells[place] = max(cells.get(place, 0), error)
    return cells


def _heat(
    name: str,
    title: str,
    cells: Mapping[tuple[str, int], float],
    text: Callable[[float], str],
    *,
    from_zero: bool,
) -> dict[str, Any] | None:
    """Rows of parts, columns of layers; None: nothing to show. `heat` is 0 to 1, None where a layer has no such part.

    from_zero: the scale begins at zero; else at the smallest value, which shows what differs little.
    """
    if not cells:
        return None
    layers = range(max(layer for _, layer in cells) + 1)
    parts = list(dict.fromkeys(part for part, _ in cells))
    parts.sort(key=lambda part: (part == VECTORS, part))
    least, most = 0.0 if from_zero else min(cells.values()), max(cells.values())

    def cell(part: str, layer: int) -> dict[str, Any]:
        value = cells.get((part, layer))
        said = "none" if value is None else text(value)
        return {
            "heat": None if value is None else round((value - least) / (most - least), 3) if most > least else 1,
            "detail": f"layer {layer}, {part}: {said}",
        }

    return {
        "name": name,
        "title": title,
        "layers": layers,
        "rows": [{"part": part, "cells": [cell(part, layer) for layer in layers]} for part in parts],
        "least": text(least),
        "most": text(most),
    }


def _kernels(tree: nnx.Module) -> list[dict[str, Any]]:
    groups: dict[OpChoice, list[str]] = {}
    for path, choice in lower.choices(tree):
        groups.setdefault(choice, []).append(path)
    return [
        {"choice": choice, "sites": len(paths), "first": paths[0], "declined": _by_reason(choice.declined)}
        for choice, paths in sorted(groups.items(), key=lambda item: item[0].op)
    ]


def _by_reason(declined: Sequence[tuple[str, str]]) -> list[tuple[list[str], str]]:
    """Rows of one reason together, reasons in the order of the table."""
    rows: dict[str, list[str]] = {}
    for name, reason in declined:
        rows.setdefault(reason, []).append(name)
    return [(names, reason) for reason, names in rows.items()]

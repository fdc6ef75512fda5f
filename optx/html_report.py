"""What a compile or a plan did as one HTML page that needs nothing beside it: no network, no script to read it.

Passes as steps, bytes of a decode step by pass, a roofline with every op, times by op as predicted and as measured, bytes and
errors by layer, kernels with the reasons of those that declined, recipe and provenance. `html_report.html` beside this file is
its template.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from optx import ir
from optx.cost import StepBytes, step_bytes
from optx.estimate import Estimate, by_op, estimate
from optx.measured import StepTimes
from optx.pipeline import Record, flat_errors
from optx.report_data import LayerMap, Subject, kernels, layer_maps
from optx.roofline import roofline
from optx.target import Target

DIFF_LINES = 120  # of a pass that are shown


def page(
    subject: Subject,
    *,
    batch: int = 1,
    context: int | None = None,
    measured: Sequence[StepTimes] = (),
    how: str = "",
) -> str:
    """The whole page. batch sequences of `context` tokens (None: the model's context) are decoded in its figures.

    measured: steps to show as predicted and as measured; how: on what, and what predicted them.

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
        bounds=bounds,
        measured=[_measured(i, step, measured) for i, step in enumerate(measured)],
        measured_panels=[_panel(i) for i in range(len(measured))],
        how=how,
        maps=[_heat(found) for found in layer_maps(bounds.decode.ops, subject.records)],
        outside=[(op.path, op.op, ir.size_text(op.bytes)) for op in bounds.decode.ops if op.layer is None],
        kernels=kernels(subject.chosen),
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
        *_predicted(bounds),
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


def _predicted(bounds: Estimate) -> list[tuple[str, str, str]]:
    """None where the target's kernels were not measured."""
    if bounds.predicted is None:
        return []
    speed = f"{bounds.batch / bounds.predicted.seconds:,.0f} tokens/s, by what kernels were measured to reach"
    return [("Time a decode step, predicted", time_text(bounds.predicted.seconds), speed)]


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


def _heat(found: LayerMap) -> dict[str, Any]:
    """Rows of parts, columns of layers. `heat` is 0 to 1, None where a layer has no such part."""
    text = ir.size_text if found.name == "bytes" else percent_text

    def cell(part: str, layer: int, value: float | None) -> dict[str, Any]:
        said = "none" if value is None else text(value)
        heat = None if value is None else round(found.share(value), 3)
        return {"heat": heat, "detail": f"layer {layer}, {part}: {said}"}

    return {
        "name": found.name,
        "title": found.title,
        "layers": found.layers,
        "rows": [
            {"part": part, "cells": [cell(part, *each) for each in zip(found.layers, found.row(part), strict=True)]}
            for part in found.parts
        ],
        "least": text(found.least),
        "most": text(found.most),
    }


def _panel(i: int) -> str:
    return f"step{i}"


def _measured(i: int, step: StepTimes, all_steps: Sequence[StepTimes]) -> dict[str, Any]:
    """Bars in per cent of the longest op of the step; a bound as the place of a mark."""
    longest = max(max(op.predicted_seconds, op.measured_seconds or 0) for op in step.ops)
    rows = [
        {
            "name": f"{op.op} {op.format}".strip(),
            "predicted": op.predicted_seconds,
            "measured": op.measured_seconds,
            "bound": op.bound_seconds,
            "ratio": op.ratio,
            "bars": [100 * (seconds or 0) / longest for seconds in (op.predicted_seconds, op.measured_seconds)],
            "mark": 100 * op.bound_seconds / longest,
        }
        for op in step.ops
    ]
    return {
        "step": step,
        "panel": _panel(i),
        "mixed": len({each.context for each in all_steps}) > 1,
        "rows": rows,
        "by_op": any(op.measured_seconds is not None for op in step.ops),
    }

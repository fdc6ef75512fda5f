"""What a compile did, as text and as plain data: bytes and error by pass, kernel by op."""

import dataclasses
from collections.abc import Sequence

from optx.cost import StepBytes
from optx.estimate import AGAIN, Estimate, by_op
from optx.ir import size_text
from optx.pipeline import Record, flat_errors
from optx.registry import Stage
from optx.target import Target


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned: the first left, the others right."""
    lines = [list(header), *[list(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]
    return "\n".join([text[0].rstrip(), "  ".join("-" * w for w in widths), *(line.rstrip() for line in text[1:])])


def pass_rows(records: Sequence[Record]) -> list[list[str]]:
    rows = []
    for record in records:
        error = flat_errors(record)
        rows.append([
            record.name,
            record.stage,
            _sites(record),
            f"{size_text(record.weight_bytes[0])} -> {size_text(record.weight_bytes[1])}",
            f"{record.cache_bytes[0]:,.0f} -> {record.cache_bytes[1]:,.0f}",
            "exact" if record.exact else ("-" if error is None else f"{error[0]:.4f} / {error[1]:.4f}"),
            f"{record.seconds:.2f}",
        ])  # fmt: skip
    return rows


def quality_text(records: Sequence[Record]) -> str:
    """What each lossy pass cost on calibration text, and the sites whose output it changed most."""
    measured = [(record.name, record.quality) for record in records if record.quality is not None]
    rows, worst = [], []
    for name, q in measured:
        errors = sorted(q.errors.items(), key=lambda item: item[1], reverse=True)
        mean = sum(q.errors.values()) / max(len(errors), 1)
        shown = f"{mean:.4f} / {errors[0][1]:.4f}" if errors else "-"
        rows.append([name, f"{q.kl:.6f}", f"{100 * q.top1:.2f} %", shown])
        sites = ", ".join(f"{path} {error:.4f}" for path, error in errors[:WORST])
        worst += [f"{name} changes most the output of: {sites}"] if sites else []
    title = f"quality against the uncompiled model, {measured[0][1].tokens:,} calibration tokens"
    return "\n".join([title, table(QUALITY_HEADER, rows), *worst])


def unhealed_text(records: Sequence[Record]) -> str:
    """Says which passes are meant to be healed and are not; '' where all are."""
    names = [record.name for record in records if record.needs_healing]
    if not names or any(record.stage == Stage.HEAL for record in records):
        return ""
    return (
        f"not healed: {', '.join(names)} start training-free and lose quality that distillation wins back; add "
        "'heal: [{pass: distill, text: [FILE]}]' to the recipe, or run optx heal"
    )


def healing_text(records: Sequence[Record]) -> str:
    """What conversion cost before and after healing, and the bytes that it saves; '' where nothing was healed."""
    lines = []
    for h in (record.healing for record in records if record.healing is not None):
        won = f", {1 - h.kl[1] / h.kl[0]:.1%} won back" if h.kl[0] > 0 else ""
        base, before, after = h.perplexity
        weights, caches = (" -> ".join(map(size_text, sizes)) for sizes in (h.weight_bytes, h.kv_bytes))
        lines += [
            f"healing: {h.steps:,} steps, {h.tokens:,} tokens in {h.seconds:,.0f} s, {h.moved:,} numbers moved",
            f"  held-out KL {h.kl[0]:.4g} -> {h.kl[1]:.4g} nats a token{won}",
            f"  held-out perplexity {before:.4g} -> {after:.4g}, uncompiled {base:.4g}",
            f"  weights {weights}, caches of one sequence of the whole context {caches}",
            f"  log and curves: {h.folder}",
            "",
        ]
    return "\n".join(lines)


WORST = 3  # sites that the report names
QUALITY_HEADER = ("after", "KL, nats/token", "top-1", "output error mean/max")
STEP_HEADER = ("after", "stage", "sites", "weights read", "KV a token", "KV read", "bytes a step")
OP_HEADER = ("op", "stored as", "sites", "bytes", "GFLOP", "ms")
HEADER = ("pass", "stage", "sites", "weights", "KV B/token", "error mean/max", "s")


def step_text(records: Sequence[Record], steps: Sequence[StepBytes], target: Target, devices: int = 1) -> str:
    """Bytes of one decode step before the first pass and after each, and what they bound on one device of the target."""
    last = steps[-1]
    rows = [
        [name, stage, sites, size_text(s.weights), f"{s.kv_token:,.0f} B", size_text(s.kv), size_text(s.total)]
        for (name, stage, sites), s in zip(
            [("(input)", "", ""), *((r.name, r.stage, _sites(r)) for r in records)], steps, strict=True
        )
    ]
    many = "one sequence" if last.batch == 1 else f"each of {last.batch:,} sequences"
    lines = [f"one decode step: a new token for {many} of {last.context:,} tokens", table(STEP_HEADER, rows), ""]
    lines += [f"{name} skipped sites: {reason}" for name, reason in _skipped(records)]
    if steps[0].total != last.total:
        ratio = steps[0].total / last.total
        lines.append(f"bytes a step: {size_text(steps[0].total)} -> {size_text(last.total)}, {ratio:.2f}x fewer")
    if devices == 1 and (seconds := last.seconds(target)) is not None:
        speed = f"{size_text(target.bandwidth)}/s"
        lines.append(f"time a step: at least {1e3 * seconds:.3g} ms on {target} ({speed} of memory bandwidth)")
        if last.unread:
            more = last.total + last.unread
            lines.append(
                f"not in it: the input embedding, of which a step reads single rows; counted, {size_text(more)} and "
                f"{1e3 * more / target.bandwidth:.3g} ms"
            )
    room = ""
    if target.memory and devices == 1:
        room = f", {target} has {size_text(target.memory)}" + (
            "" if last.held <= target.memory else ": it does not fit"
        )
    return "\n".join([*lines, f"memory for weights and KV: {size_text(last.held)}{room}"])


def estimate_text(e: Estimate) -> str:
    """Bounds on the target, op by op; a line for each figure that the target's row allows."""
    groups = by_op(e.decode)
    rows = [
        [g["op"], g["format"], f"{g['sites']}", size_text(g["bytes"]), f"{g['flops'] / 1e9:,.1f}", _ms(g["seconds"])]
        for g in groups
    ]
    where = f"{e.target}" if e.mesh.devices == 1 else f"{e.mesh.devices} {e.target} ({e.mesh})"
    share = "" if e.mesh.devices == 1 else ": the share of one device"
    lines = [f"the result on {where}, a decode step op by op{share}", table(OP_HEADER, rows), ""]
    if e.tpot is not None:
        ridge = f", ridge at {e.ridge:,.0f}" if e.ridge else ""
        lines.append(
            f"decode: at most {e.tokens_per_second:,.5g} tokens/s, TPOT {_ms(e.tpot)} ms; {e.decode.binds} binds "
            f"({e.decode.intensity:.3g} FLOP/B{ridge})"
        )
        lines.append(_predicted_text(e))
    attention = sum(op.flops for op in e.prefill.ops if op.op == "attention")
    first = "" if e.ttft is None else f", TTFT at least {_ms(e.ttft)} ms"
    each = "" if e.mesh.devices == 1 else " a device"
    if each and e.target.memory:
        fits = "" if e.held <= e.target.memory else ": it does not fit"
        lines.append(f"memory a device: {size_text(e.held)} of {size_text(e.target.memory)}{fits}")
    lines.append(
        f"prefill of {e.context:,} tokens: {e.prefill.flops / 1e12:,.4g} TFLOP{each} "
        f"({attention / 1e12:,.4g} of attention){first}"
    )
    most = [
        f"{e.largest_batch:,} sequences of {e.context:,} tokens" if e.largest_batch is not None else "",
        f"{e.largest_context:,} tokens in each of {e.batch:,}" if e.largest_context is not None else "",
    ]
    lines += [f"memory holds at most: {'; '.join(filter(None, most))}"] if any(most) else []
    if e.ttft is not None:
        back = ", ".join(f"{_ms(rung.seconds)} ms {_from(rung.name)}" for rung in e.kv_rungs[1:])
        lines.append(f"KV of one sequence back: {back}")
    costs = [
        f"{e.joules_per_token:.3g} J of memory" if e.joules_per_token is not None else "",
        f"${e.dollars_per_million:,.3g} a million" if e.dollars_per_million is not None else "",
    ]
    lines += [f"a decoded token takes at least: {'; '.join(filter(None, costs))}"] if any(costs) else []
    return "\n".join(lines)


def _predicted_text(e: Estimate) -> str:
    if e.predicted is None:
        return f"predicted: those bounds alone; what the kernels reach on {e.target} was not measured"
    found, speed = e.predicted, e.batch / e.predicted.seconds
    left = f"; at their bounds for want of a measurement: {', '.join(found.unmeasured)}" if found.unmeasured else ""
    return (
        f"predicted: TPOT {_ms(found.seconds)} ms, {speed:,.5g} tokens/s, {found.seconds / e.tpot:.2f}x the bound (efficiencies "
        f"and launches: {found.source}){left}"
    )


def _from(place: str) -> str:
    return place if place == AGAIN else f"from {place}"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:,.0f}" if seconds >= 1 else f"{1e3 * seconds:.4g}"


def _sites(record: Record) -> str:
    return f"{record.sites}" + (f" (-{len(record.skipped)})" if record.skipped else "")


def _skipped(records: Sequence[Record]) -> list[tuple[str, str]]:
    return sorted({(record.name, reason) for record in records for reason in record.skipped.values()})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """The outcome of a compile; `str` prints it, `to_dict` is its JSON form."""

    model: str
    recipe: str
    target: str
    records: tuple[Record, ...]
    weight_bytes: int
    cache_bytes: float  # a token
    file_bytes: int
    kernels: str

    def __str__(self):
        parts = [
            f"{self.model} + {self.recipe} for {self.target}",
            f"weights {size_text(self.weight_bytes)} (files {size_text(self.file_bytes)}), KV {self.cache_bytes:,.0f} B/token",
            "",
        ]
        if self.records:
            parts += [table(HEADER, pass_rows(self.records)), ""]
        if any(record.quality for record in self.records):
            parts += [quality_text(self.records), ""]
        parts += [line for line in (unhealed_text(self.records), healing_text(self.records)) if line]
        parts += [f"{name} skipped sites: {reason}" for name, reason in _skipped(self.records)]
        parts += ["kernels:", *(f"  {line}" for line in self.kernels.splitlines())]
        return "\n".join(parts)

    def to_dict(self) -> dict:
        return dataclasses.asdict(self) | {"records": [record_dict(record) for record in self.records]}


def kept(records: Sequence[Record], target: Target) -> dict:
    """What an export keeps of its compile: the target, and of each pass what shapes alone do not tell again."""
    return {"target": target.name, "passes": [record_dict(record) | {"errors": record.errors} for record in records]}


def record_dict(record: Record) -> dict:
    error = flat_errors(record)
    return {
        "pass": record.name,
        "stage": record.stage,
        "axis": record.axis,
        "exact": record.exact,
        "sites": record.sites,
        "skipped": record.skipped,
        "weight_bytes": {"before": record.weight_bytes[0], "after": record.weight_bytes[1]},
        "kv_bytes_per_token": {"before": record.cache_bytes[0], "after": record.cache_bytes[1]},
        "error": None if error is None else {"mean": error[0], "max": error[1]},
        "quality": record.quality and dataclasses.asdict(record.quality),
        "healing": record.healing and dataclasses.asdict(record.healing),
        "seconds": record.seconds,
    }

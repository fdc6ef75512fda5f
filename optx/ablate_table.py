"""Results of an ablation as text, markdown, CSV and JSON, and the Pareto front of quality against size."""

import csv
import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from optx.ir import size_text
from optx.report import table

UNCOMPILED = "(uncompiled)"
NUMBER = "-"  # stands for a figure that there is not


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """One model compiled with one recipe. Figures are None where the recipe was refused."""

    model: str = ""
    variant: str
    recipe: dict
    key: str = ""  # of the file that keeps it
    refused: str | None = None  # why there are no figures
    bits: float | None = None  # a weight, of all weights
    layer_bits: float | None = None  # a weight, of the layers' matrices; None: there are none
    weight_bytes: int | None = None
    kv_bytes_per_token: float | None = None  # that one token leaves behind
    bytes_per_token: float | None = None  # weights and caches that a decode step at batch 1 reads
    ms_bound: float | None = None  # of that step on the target, at least; None: its bandwidth is not known
    ms_predicted: float | None = None  # None: the target's kernels were not measured
    perplexity: float | None = None
    kl: float | None = None  # nats a token against the uncompiled model
    top1: float | None = None  # share of tokens whose most likely next token is the uncompiled model's
    windows: int | None = None
    tokens: int | None = None  # scored
    compile_seconds: float | None = None  # a pass that variants share counts for each
    eval_seconds: float | None = None
    passes: tuple[dict, ...] = ()  # as the report of a compile has them

    @property
    def healing(self) -> dict | None:
        """What training has won back, as `pipeline.Healing` has it."""
        return next((p["healing"] for p in self.passes if p.get("healing")), None)

    def line(self) -> str:
        """What is told of it when it comes."""
        if self.refused is not None:
            return f"{self.variant}: refused: {self.refused}"
        seconds = f"{self.compile_seconds:.1f} s compile, {self.eval_seconds:.1f} s evaluate"
        return f"{self.variant}: KL {self.kl:.4g}, perplexity {self.perplexity:.4f}; {seconds}"


# What KL is drawn against: the label of the axis, and a result's value.
AXES: Mapping[str, tuple[str, Callable[[Result], float | None]]] = {
    "layer_bits": ("bits a weight of the layers' matrices, scales included", lambda r: r.layer_bits),
    "bits": ("bits a weight of the whole model, scales included", lambda r: r.bits),
    "bytes_per_token": ("bytes that a decode step reads at batch 1", lambda r: r.bytes_per_token),
    "kv_bytes_per_token": ("bytes of cache a token, scales included", lambda r: r.kv_bytes_per_token),
    "ms_bound": ("ms of a decode step at least, at batch 1", lambda r: r.ms_bound),
}
COLUMNS: Mapping[str, Callable[[Result], str]] = {
    "bits": lambda r: _number(r.layer_bits, ".3f"),
    "bits, all": lambda r: _number(r.bits, ".3f"),
    "weights": lambda r: NUMBER if r.weight_bytes is None else size_text(r.weight_bytes),
    "KV B/token": lambda r: _number(r.kv_bytes_per_token, ",.0f"),
    "read a token": lambda r: NUMBER if r.bytes_per_token is None else size_text(r.bytes_per_token),
    "ms, bound": lambda r: _number(r.ms_bound, ".4g"),
    "ms, predicted": lambda r: _number(r.ms_predicted, ".4g"),
    "perplexity": lambda r: "refused" if r.refused else _number(r.perplexity, ".4f"),
    "KL": lambda r: _number(r.kl, ".3g"),
    "top-1": lambda r: NUMBER if r.top1 is None else f"{100 * r.top1:.2f} %",
    "compile s": lambda r: _number(r.compile_seconds, ".1f"),
    "eval s": lambda r: _number(r.eval_seconds, ".1f"),
}
FRONT = "front"


def _number(value: float | None, form: str) -> str:
    return NUMBER if value is None else format(value, form)


def front(results: Sequence[Result], x: str) -> list[Result]:
    """Of each model, the variants that none beats in both x and KL, by rising x. Equal points are all on it."""
    of = AXES[x][1]
    drawn = [r for r in results if r.variant != UNCOMPILED and r.kl is not None and of(r) is not None]

    def beaten(r: Result) -> bool:
        mine = (of(r), r.kl)
        return any(
            other.model == r.model and (of(other), other.kl) != mine and of(other) <= mine[0] and other.kl <= mine[1]
            for other in drawn
        )

    return sorted((r for r in drawn if not beaten(r)), key=lambda r: (r.model, of(r), r.kl))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """An ablation's results, and what they were measured with."""

    name: str
    description: str
    protocol: Mapping[str, Any]  # text, windows, target
    x: str
    results: tuple[Result, ...]

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """(header, a row a result)."""
        best = {(r.model, r.variant) for r in front(self.results, self.x)}
        several = len({r.model for r in self.results}) > 1
        header = ["variant", *(["model"] if several else []), *COLUMNS, FRONT]
        rows = [
            [r.variant, *([r.model] if several else []), *(cell(r) for cell in COLUMNS.values()), mark]
            for r in self.results
            for mark in ["*" if (r.model, r.variant) in best else ""]
        ]
        return header, rows

    def title(self) -> str:
        models = ", ".join(dict.fromkeys(r.model for r in self.results))
        return f"{self.name}: {models}"

    def notes(self) -> list[str]:
        p = self.protocol
        scored = next((r for r in self.results if r.windows), None)
        windows = f"{scored.windows} windows of up to {p['context']:,} tokens" if scored else "nothing"
        return [
            f"Perplexity, KL (nats a token) and top-1 agreement against the uncompiled model over {windows} of {p['text']}.",
            "bits: stored a weight of the layers' matrices, scales and zero points included; all: of the whole model, with "
            "embedding, head and vectors.",
            f"read a token: weights and caches that a decode step reads at batch 1 and {p['decode_context']:,} tokens; ms: "
            f"its time on {p['target']}, the bound that no program beats, and predicted by its "
            "kernels where they were measured (others count at their bound).",
            "compile s: passes and lowering; a pass that variants share is run once and counted for each.",
            f"{FRONT}: no other variant is lower in both KL and {AXES[self.x][0]}.",
            *(
                f"healed: {r.model}, {r.variant}: KL {h['kl'][0]:.3g} to {h['kl'][1]:.3g} on sequences that were not trained on, "
                f"{h['steps']:,} steps, {h['tokens']:,} tokens, {h['seconds']:,.0f} s"
                for r in self.results
                if (h := r.healing) is not None
            ),
            *(f"refused: {r.model}, {r.variant}: {r.refused}" for r in self.results if r.refused),
        ]

    def text(self) -> str:
        header, rows = self.rows()
        return "\n".join([self.title(), "", table(header, rows), "", *self.notes()])

    def markdown(self) -> str:
        header, rows = self.rows()
        align = ["---", *("---:" for _ in header[1:])]
        lines = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in (header, align, *rows)]
        head = [f"# {self.title()}", "", *([self.description, ""] if self.description else [])]
        notes = [f"- {note}" for note in self.notes()]
        return "\n".join([*head, *(f"| {line} |" for line in lines), "", *notes, ""])

    def csv(self) -> str:
        """A line a result, every figure in full."""
        names = [f.name for f in dataclasses.fields(Result) if f.name not in ("recipe", "passes")]
        best = {(r.model, r.variant) for r in front(self.results, self.x)}
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*names, FRONT])
        for r in self.results:
            values = ("" if getattr(r, name) is None else getattr(r, name) for name in names)
            writer.writerow([*values, int((r.model, r.variant) in best)])
        return text.getvalue()

    def to_dict(self) -> dict:
        best = front(self.results, self.x)
        return {
            "name": self.name,
            "description": self.description,
            "protocol": dict(self.protocol),
            "x": self.x,
            "results": [dataclasses.asdict(r) | {FRONT: r in best} for r in self.results],
        }

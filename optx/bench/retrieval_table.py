"""What a retrieval run found, as text, markdown and JSON."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from optx.ablate_table import NUMBER
from optx.ir import size_text
from optx.report import table

ABLE = 0.8  # score of the uncompiled model from which a cell says something about what a recipe retains


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One length and depth under one recipe."""

    length: int  # tokens of each prompt
    depth: float
    numbers: tuple[str, ...]  # that were asked for
    answers: tuple[str, ...]
    score: float  # share of prompts whose answer begins with the right number, digit for digit
    logprob: float  # mean log-probability a digit of the right number, nats
    pages: float  # cache pages that a prompt holds while it answers, of all groups; mean of the prompts
    bytes: float  # of those pages, in all layers
    tokens: int  # of prompts and answers
    seconds: float  # for all prompts, several at once

    def line(self) -> str:
        rate = f"{self.tokens / self.seconds:,.0f} tokens/s"
        where = f"{self.length:,} tokens, depth {self.depth:.0%}"
        return f"{where}: score {self.score:.0%}, log-prob a digit {self.logprob:.3f}, {self.pages:g} pages, {rate}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One recipe."""

    recipe: str
    steps: dict  # the recipe itself
    cells: tuple[Cell, ...] = ()
    refused: str | None = None  # why there are no cells

    def score(self) -> float | None:
        return statistics.fmean(cell.score for cell in self.cells) if self.cells else None


def retained(row: Row, base: Row) -> float | None:
    """Mean score over the cells where the uncompiled model scores ABLE or more, by the uncompiled model's over the same cells.
    None where there is no such cell."""
    able = [(mine.score, its.score) for mine, its in zip(row.cells, base.cells) if its.score >= ABLE]
    return sum(mine for mine, _ in able) / sum(its for _, its in able) if able else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """A run's rows, the uncompiled model's first, and what they were asked."""

    model: str
    protocol: Mapping[str, Any]
    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        return f"retrieval, {self.protocol['task']}: {self.model}"

    def tables(self) -> tuple[list[list[str]], list[list[str]]]:
        """(scores, what the engine held), each with its header first."""
        lengths = list(dict.fromkeys(cell.length for row in self.rows for cell in row.cells))
        scores = [["recipe", "score", "retained", "log-prob a digit", *(f"{n:,}" for n in lengths)]]
        held = [["recipe", "length", "pages a prompt", "bytes a prompt", "bytes a token", "tokens/s"]]
        for row in self.rows:
            logprob = statistics.fmean(cell.logprob for cell in row.cells) if row.cells else None
            by_length = {n: [cell for cell in row.cells if cell.length == n] for n in lengths}
            means = [_percent(_mean(cells, "score")) for cells in by_length.values()]
            whole = "refused" if row.refused else _percent(row.score())
            number = NUMBER if logprob is None else f"{logprob:.3f}"
            scores.append([row.recipe, whole, _percent(retained(row, self.rows[0])), number, *means])
            held += [[row.recipe, f"{n:,}", *_held(n, cells)] for n, cells in by_length.items() if cells]
        return scores, held

    def notes(self) -> list[str]:
        p = self.protocol
        asked = f"{p['samples']} prompts a cell, depths {', '.join(f'{depth:.0%}' for depth in p['depths'])}"
        keys = f" among {p['keys'] - 1} others" if p["task"] == "multikey" else ""
        base = self.rows[0].cells
        able = sum(cell.score >= ABLE for cell in base)
        return [
            f"A number of 7 digits{keys} in {p['text']}, seed {p['seed']}; {asked}. Prompts are exactly as long as they are "
            "said to be, and the same for all recipes.",
            "score: greedy answers that are right digit for digit; log-prob a digit: of the right number, forced, in nats.",
            f"retained: the mean score by the uncompiled model's, over the {able} of {len(base)} cells where that is at least "
            f"{ABLE:.0%}.",
            "pages, bytes: the least that a prompt's row holds in the engine's pools while it answers, after an eviction if "
            "there is one; a layer whose heads compete counts its pages apart. A token: by the prompt's length. tokens/s: of "
            "prompts and answers, several prompts at once.",
            *(f"refused: {row.recipe}: {row.refused}" for row in self.rows if row.refused),
        ]

    def text(self) -> str:
        scores, held = self.tables()
        parts = [self.title, "", table(scores[0], scores[1:]), "", table(held[0], held[1:]), "", *self.notes()]
        return "\n".join(parts)

    def markdown(self) -> str:
        tables = ["\n".join(_markdown(rows)) for rows in self.tables()]
        return "\n".join(
            [f"# {self.title}", "", tables[0], "", tables[1], "", *(f"- {note}" for note in self.notes()), ""]
        )

    def to_dict(self) -> dict:
        rows = [
            dataclasses.asdict(row) | {"score": row.score(), "retained": retained(row, self.rows[0])}
            for row in self.rows
        ]
        return {"model": self.model, "protocol": dict(self.protocol), "able": ABLE, "rows": rows}


def _mean(cells: Sequence[Cell], name: str) -> float | None:
    return statistics.fmean(getattr(cell, name) for cell in cells) if cells else None


def _percent(value: float | None) -> str:
    return NUMBER if value is None else f"{100 * value:.1f} %"


def _held(length: int, cells: Sequence[Cell]) -> list[str]:
    size, seconds = _mean(cells, "bytes"), sum(cell.seconds for cell in cells)
    rate = sum(cell.tokens for cell in cells) / seconds
    return [f"{_mean(cells, 'pages'):g}", size_text(size), f"{size / length:,.0f}", f"{rate:,.0f}"]


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    header, *body = rows
    align = ["---", *("---:" for _ in header[1:])]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in (header, align, *body)]

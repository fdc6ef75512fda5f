"""A search's result as text and as files."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from optx.report import table
from optx.search import Found, Point
from optx.slo import KINDS

COLUMNS = ("bits", "weights", "bytes", "memory", "tpot", "ttft")
HEADER = ("recipe", "bits", "weights", "bytes a step", "memory", "TPOT", "TTFT", "KL predicted", "KL measured", "")
UNKNOWN = "-"  # a figure that the target does not tell, or a form that was left out


def text(found: Found) -> str:
    """The front and the uniform recipes as tables, and the winner."""
    parts = [_title(found), table(HEADER, _rows(found.front, found))]
    parts += ["", "one candidate everywhere", table(HEADER, _rows(found.uniform, found))]
    return "\n".join([*parts, "", *_notes(found)])


def markdown(found: Found) -> str:
    """The same for a reader of Markdown."""
    front, uniform = (_markdown(_rows(points, found)) for points in (found.front, found.uniform))
    notes = "\n\n".join(_notes(found))
    return f"# {_title(found)}\n\n{front}\n\n## One candidate everywhere\n\n{uniform}\n\n{notes}\n"


def missed(found: Found) -> str:
    """Which bound no point keeps, and by how much."""
    most = found.slo.get("kl")
    within = [point for point in found.front if all(limit.within(point.figures) for limit in found.limits)]
    best = min(within, key=lambda point: point.measured)
    said = ", ".join(limit.said for limit in found.limits)
    keeps = [point for point in found.front if point.measured <= most]
    near = min(keeps, key=lambda point: point.figures[found.figure], default=None)
    costs = "" if near is None else f"; the smallest that keeps it has {found.figure} {_shown(found.figure, near)}"
    found_is = f"the best recipe of the candidates{said and f' within {said}'} costs {best.measured:.4g} nats"
    return f"slo: kl<={most:.4g} cannot be met: {found_is}, {best.measured / most:.3g}x too much{costs}"


def write(found: Found, out: Path) -> list[Path]:
    """front.json, front.md, the recipe of every point, and winner.yaml where there is a winner."""
    out.mkdir(parents=True, exist_ok=True)
    files = {
        "front.json": json.dumps(found.to_dict(), indent=1, ensure_ascii=False) + "\n",
        "front.md": markdown(found),
    }
    files |= {f"{point.name}.yaml": point.recipe.to_yaml() for point in found.front}
    if found.winner is not None:
        files["winner.yaml"] = dataclasses.replace(found.winner.recipe, name="winner").to_yaml()
    for stale in (*out.glob("point[0-9]*.yaml"), out / "winner.yaml"):
        stale.unlink(missing_ok=True)
    for name, content in files.items():
        (out / name).write_text(content, encoding="utf-8")
    return [out / name for name in files]


def _title(found: Found) -> str:
    at = f"{found.context:,} tokens of context, KL over {found.tokens:,} tokens"
    return f"{found.model} for {found.target} under {found.slo}: {at}"


def _rows(points: Sequence[Point], found: Found) -> list[list[str]]:
    return [
        [
            point.name,
            *(_shown(column, point) for column in COLUMNS),
            UNKNOWN if np.isinf(point.predicted) else f"{point.predicted:.4g}",
            f"{point.measured:.4g}",
            _remark(point, found),
        ]
        for point in points
    ]


def _shown(figure: str, point: Point) -> str:
    value = point.figures[figure]
    return UNKNOWN if np.isnan(value) else KINDS[figure].text(value).removesuffix(" bits")


def _remark(point: Point, found: Found) -> str:
    if point is found.winner:
        return "winner"
    broken = [limit.figure for limit in found.limits if not limit.within(point.figures)]
    broken += ["kl"] if found.slo.get("kl") and not point.measured <= found.slo.get("kl") else []
    return f"over {', '.join(dict.fromkeys(broken))}" if broken else ""


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [HEADER, ["---"] + ["---:"] * (len(HEADER) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _notes(found: Found) -> list[str]:
    notes = ["Times are bounds that no program beats. KL is against the model as it is, in nats a token."]
    notes += found.notes
    return notes + ([] if found.winner is None else [f"winner: {found.winner.name}"])
